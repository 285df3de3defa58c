"""A recipe's loss put together: policy loss times weights, plus terms, aggregated into a
micro-batch's share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rltrain.registry import BoundMethod
from rltrain.tensor_ops import masked, masked_sum
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch

__all__ = ["Objective", "ObjectiveShare", "Term"]


def _nothing() -> Mapping[str, float]:
    return {}


class Term(NamedTuple):
    name: str  # of its metric, ``loss/<name>``
    method: BoundMethod
    coefficient: (
        float | Callable[[], float]
    )  # a controller is asked at every call; a constant 0 switches the term off
    inputs: Callable[[], Mapping[str, float]] = (
        _nothing  # what a controller tells its term beside, by the term's keyword
    )


@dataclass(frozen=True)
class ObjectiveShare:
    """What one micro-batch contributes to an update.

    Shares of all micro-batches and ranks add up to the update's numbers.
    """

    loss: Tensor  # () with gradient
    metrics: dict[str, Tensor]  # () each, detached: sum over this micro-batch's tokens / totals.tokens


@dataclass(frozen=True)
class Objective:
    policy_loss: BoundMethod
    terms: tuple[Term, ...]
    aggregate: BoundMethod

    @property
    def needs(self) -> frozenset[str]:
        """What the learner must compute: the union over the policy loss and every term that is not
        switched off.
        """
        return self.policy_loss.needs.union(
            *(method.needs for _, method, coefficient, _ in self.terms if coefficient != 0)
        )

    def __call__(self, policy: PolicyTokens, batch: TrainBatch, totals: StepTotals) -> ObjectiveShare:
        """This micro-batch's share of the loss and of the metrics. ``policy`` and ``batch`` are row for row
        the same tokens.

        Padding may hold anything, NaN included. An absent ``old_logp`` means that the step makes a single
        on-policy update: the ratio is then taken against the detached current log-probs and is exactly 1
        (this is the one place of that rule).
        """
        policy, batch = _without_padding(policy, batch)
        if batch.old_logp is None:
            batch = batch.replace(old_logp=policy.logp.detach())
        main = self.policy_loss(policy, batch)
        shown = {"policy": main.values, **main.metrics}
        per_token = main.values.expand(batch.mask.shape) * batch.weights
        for name, method, coefficient, inputs in self.terms:
            factor = _now(coefficient)
            if factor != 0:
                term = method(
                    policy, batch, **{key: policy.logp.new_tensor(value) for key, value in inputs().items()}
                )
                shown |= {
                    name: term.values,
                    **{f"{name}_{key}": value for key, value in term.metrics.items()},
                }
                per_token = per_token + factor * term.values
        metrics = {f"loss/{name}": _token_share(values, batch.mask, totals) for name, values in shown.items()}
        return ObjectiveShare(self.aggregate(per_token, batch.mask, totals), metrics)

    def idle_rows(self, batch: TrainBatch) -> Tensor:
        """(B,) bool: rows whose gradient is exactly 0, so that the learner need not run them.

        Either nothing of them is masked in, or no term is on and every token has advantage 0 or weight 0. A
        sequence-level loss mixes the tokens of a row before weighing them: there one of the two must be 0
        throughout. A loss that pulls tokens of advantage 0 says so: "acts_on_marks" where ``extra`` is not 0,
        "reward_free" everywhere.
        """
        empty, traits = ~batch.mask.any(dim=1), self.policy_loss.spec.traits
        if any(_now(coefficient) != 0 for _, _, coefficient, _ in self.terms):
            return empty
        no_advantage, no_weight = (batch.advantages == 0) | ~batch.mask, (batch.weights == 0) | ~batch.mask
        if "reward_free" in traits:
            no_advantage = ~batch.mask
        if "acts_on_marks" in traits:
            for marks in batch.extra.values():
                no_advantage = no_advantage & ((marks == 0) | ~batch.mask)
        if "sequence_level" in traits:
            return no_advantage.all(dim=1) | no_weight.all(dim=1)
        return (no_advantage | no_weight).all(dim=1)


def _now(coefficient: float | Callable[[], float]) -> float:
    return coefficient() if callable(coefficient) else coefficient


def _without_padding(policy: PolicyTokens, batch: TrainBatch) -> tuple[PolicyTokens, TrainBatch]:
    """Zeros where the mask is off, in whatever a method may read.

    The backward of ``masked`` writes zeros there too, so that no gradient of a method's own making leaves the
    padding. The batch matters as much: a sequence's one value times a NaN weight of a padded column would
    spoil the whole row's gradient.
    """
    mask = batch.mask
    cleaned_policy = dataclasses.replace(
        policy,
        logp=masked(policy.logp, mask),
        entropy=None if policy.entropy is None else masked(policy.entropy, mask),
        extra={name: masked(values, mask) for name, values in policy.extra.items()},
    )
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    per_token = {
        name: value
        for name, value in fields.items()
        if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    }
    extra = {name: masked(value, mask) for name, value in batch.extra.items()}
    return cleaned_policy, batch.replace(
        **{name: masked(value, mask) for name, value in per_token.items()}, extra=extra
    )


def _token_share(values: Tensor, mask: Tensor, totals: StepTotals) -> Tensor:
    with torch.no_grad():
        return masked_sum(values.detach().expand(mask.shape), mask) / max(totals.tokens, 1)
