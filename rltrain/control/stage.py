"""The control stage: applies a registered control to a batch and measures how much it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.needs import PER_UPDATE
from rltrain.registry import BoundMethod
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import TrainBatch


def current_policy_needs(needs: frozenset[str]) -> frozenset[str]:
    """The statistics in ``needs`` that are taken from the policy at the start of an update: "logp_now",
    "entropy_now", "<statistic>_now".
    """
    return frozenset(name for name in needs if name.endswith("_now"))


@dataclass(frozen=True)
class PerUpdateControls:
    """The controls that read the current policy, as one function of an optimizer batch."""

    controls: tuple[BoundMethod, ...]

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the batch must hold before the call: logp_now and entropy_now in their fields,
        others in ``extra``.
        """
        return current_policy_needs(frozenset[str]().union(*(control.needs for control in self.controls)))

    def __call__(self, batch: TrainBatch) -> TrainBatch:
        for control in self.controls:
            batch = apply_control(batch, control)
        return batch


def split_by_timing(
    controls: Sequence[BoundMethod],
) -> tuple[tuple[BoundMethod, ...], PerUpdateControls | None]:
    """Controls over the whole step, and those that run on every optimizer batch (None if there are none).

    The latter read the current policy, or count the tokens of an optimizer batch (trait "per_update").
    """

    def is_per_update(control: BoundMethod) -> bool:
        return bool(current_policy_needs(control.needs)) or PER_UPDATE in control.spec.traits

    per_step = tuple(control for control in controls if not is_per_update(control))
    per_update = tuple(control for control in controls if is_per_update(control))
    return per_step, PerUpdateControls(per_update) if per_update else None


def apply_control(batch: TrainBatch, control: BoundMethod) -> TrainBatch:
    """``control(batch)``, with two metrics that every control gets.

    ``<name>_touched``: share of the batch's tokens whose weight, advantage or mask it changed, or that it
    marked with a value other than 0 in ``extra``; they join ``touched`` of the batch. ``<name>_strength``:
    mean |change of weight x advantage| over those tokens, as a multiple of mean |weight x advantage| over the
    batch's tokens; 0 if it changed none.
    """
    after = control(batch)
    pull_before = apply_mask(batch.weights * batch.advantages, batch.mask)
    pull_after = apply_mask(after.weights * after.advantages, after.mask)
    change = (pull_after - pull_before).abs()
    touched = (change > 0) | (after.mask != batch.mask)
    touched |= apply_mask(after.weights, after.mask) != apply_mask(batch.weights, batch.mask)
    for name, values in after.extra.items():
        if values is not batch.extra.get(name):
            touched |= apply_mask(values, after.mask) != 0
    touched &= batch.mask | after.mask

    tokens = max(int(batch.mask.sum()), 1)
    size = pull_before.abs().sum() / tokens
    strength = change[touched].mean() / size if bool(touched.any()) and size > 0 else 0.0
    before = batch.touched
    return after.replace(touched=touched if before is None else touched | before).with_metrics(
        **{
            f"{control.name}_touched": int(touched.sum()) / tokens,
            f"{control.name}_strength": float(strength),
        }
    )
