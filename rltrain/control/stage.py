"""The control stage: one registered function applied to a batch, and how much it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.registry import BoundMethod
from rltrain.tensor_ops import masked
from rltrain.types.policy import TrainBatch


def current_policy_needs(needs: frozenset[str]) -> frozenset[str]:
    """Of ``needs``, the statistics of the policy as it is at the start of an update: "logp_now",
    "entropy_now", "<statistic>_now".
    """
    return frozenset(name for name in needs if name.endswith("_now"))


@dataclass(frozen=True)
class PerUpdateControls:
    """The controls that look at the current policy, as one function of an optimizer batch."""

    controls: tuple[BoundMethod, ...]

    @property
    def needs(self) -> frozenset[str]:
        """What must be filled in before the call: logp_now and entropy_now in their fields, other
        statistics in ``extra``.
        """
        return current_policy_needs(frozenset[str]().union(*(control.needs for control in self.controls)))

    def __call__(self, batch: TrainBatch) -> TrainBatch:
        for control in self.controls:
            batch = apply_control(batch, control)
        return batch


def split_by_timing(
    controls: Sequence[BoundMethod],
) -> tuple[tuple[BoundMethod, ...], PerUpdateControls | None]:
    """Controls over the whole step, and those that every optimizer batch needs anew (None without any).

    The latter look at the current policy, or count the tokens of an optimizer batch (trait "per_update").
    """

    def anew(control: BoundMethod) -> bool:
        return bool(current_policy_needs(control.needs)) or "per_update" in control.spec.traits

    later = tuple(control for control in controls if anew(control))
    return tuple(control for control in controls if not anew(control)), PerUpdateControls(
        later
    ) if later else None


def apply_control(batch: TrainBatch, control: BoundMethod) -> TrainBatch:
    """``control(batch)``, with two notes that every control leaves.

    ``<name>_touched``: share of the batch's tokens whose weight, advantage or mask it changed, or that it
    marked with a value other than 0 in ``extra``. ``<name>_strength``: mean |change of weight x advantage|
    over those tokens, as a multiple of mean |weight x advantage| over the batch's tokens; 0 where it changed
    none.
    """
    after = control(batch)
    before_pull, after_pull = (masked(one.weights * one.advantages, one.mask) for one in (batch, after))
    change = (after_pull - before_pull).abs()
    touched = (
        (change > 0)
        | (masked(after.weights, after.mask) != masked(batch.weights, batch.mask))
        | (after.mask != batch.mask)
    )
    for name, values in after.extra.items():
        if values is not batch.extra.get(name):
            touched |= masked(values, after.mask) != 0
    touched &= batch.mask | after.mask
    tokens, size = max(int(batch.mask.sum()), 1), before_pull.abs().sum() / max(int(batch.mask.sum()), 1)
    strength = change[touched].mean() / size if bool(touched.any()) and size > 0 else 0.0
    return after.with_metrics(
        **{
            f"{control.name}_touched": int(touched.sum()) / tokens,
            f"{control.name}_strength": float(strength),
        }
    )
