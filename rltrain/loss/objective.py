"""A recipe's loss: the policy loss times weights, plus terms, aggregated into a micro-batch's share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rltrain.needs import ACTS_EVERYWHERE, ACTS_ON_MARKS, REWARD_FREE, SEQUENCE_LEVEL
from rltrain.registry import BoundMethod
from rltrain.tensor_ops import apply_mask, masked_sum
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch

__all__ = ["Objective", "ObjectiveShare", "Term"]


def _no_inputs() -> Mapping[str, float | Sequence[float]]:
    return {}


class Term(NamedTuple):
    name: str  # of its metric, ``loss/<name>``
    method: BoundMethod
    # a controller is called at every use; a constant 0 switches the term off
    coefficient: float | Callable[[], float]
    # further inputs from a controller, by the term's keyword
    inputs: Callable[[], Mapping[str, float | Sequence[float]]] = _no_inputs


@dataclass(frozen=True)
class ObjectiveShare:
    """The contribution of one micro-batch to an update.

    The shares of all micro-batches and ranks add up to the update's numbers.
    """

    loss: Tensor  # () with gradient
    metrics: dict[str, Tensor]  # () each, detached: sum over this micro-batch's tokens / totals.tokens
    clipped: Tensor | None = None  # (B, T) bool: tokens that the policy loss clipped; None: it clips none


@dataclass(frozen=True)
class Objective:
    policy_loss: BoundMethod
    terms: tuple[Term, ...]
    aggregate: BoundMethod

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the learner must compute, for the policy loss and every term not switched off."""
        return self.policy_loss.needs.union(
            *(method.needs for _, method, coefficient, _ in self.terms if coefficient != 0)
        )

    def __call__(self, policy: PolicyTokens, batch: TrainBatch, totals: StepTotals) -> ObjectiveShare:
        """This micro-batch's share of the loss and of the metrics.

        ``policy`` and ``batch`` have the same tokens, row by row. Padding may hold any value, NaN included.
        An absent ``old_logp`` means that the step makes a single on-policy update: the detached current
        log-probs then replace it, so that the ratio is exactly 1. Only this function applies that rule.
        """
        policy, batch = _zero_padding(policy, batch)
        if batch.old_logp is None:
            batch = batch.replace(old_logp=policy.logp.detach())

        policy_loss = self.policy_loss(policy, batch)
        reported = {"policy": policy_loss.values, **policy_loss.metrics}
        per_token = policy_loss.values.expand(batch.mask.shape) * batch.weights
        for name, method, coefficient, inputs in self.terms:
            factor = _current_value(coefficient)
            if factor == 0:
                continue
            tensors = {key: policy.logp.new_tensor(value) for key, value in inputs().items()}
            term = method(policy, batch, **tensors)
            reported[name] = term.values
            reported |= {f"{name}_{key}": value for key, value in term.metrics.items()}
            per_token = per_token + factor * term.values

        metrics = {
            f"loss/{name}": _token_share(values, batch.mask, totals) for name, values in reported.items()
        }
        clipped = _clipped_tokens(policy_loss.metrics, batch.mask)
        return ObjectiveShare(self.aggregate(per_token, batch.mask, totals), metrics, clipped)

    def idle_rows(self, batch: TrainBatch) -> Tensor:
        """(B,) bool: rows whose gradient is exactly 0, so that the learner can skip them.

        These rows have no masked-in token, or no term is on and every token has advantage 0 or weight 0. A
        sequence-level loss mixes the tokens of a row before it weights them: there all advantages or all
        weights must be 0. A trait marks a loss with a gradient on tokens of advantage 0: "acts_on_marks" if
        that is where ``extra`` is not 0, "reward_free" or "acts_everywhere" if everywhere.
        """
        empty = ~batch.mask.any(dim=1)
        traits = self.policy_loss.spec.traits
        if any(_current_value(coefficient) != 0 for _, _, coefficient, _ in self.terms):
            return empty
        no_advantage = (batch.advantages == 0) | ~batch.mask
        no_weight = (batch.weights == 0) | ~batch.mask
        if {REWARD_FREE, ACTS_EVERYWHERE} & traits:
            no_advantage = ~batch.mask
        if ACTS_ON_MARKS in traits:
            for marks in batch.extra.values():
                no_advantage = no_advantage & ((marks == 0) | ~batch.mask)
        if SEQUENCE_LEVEL in traits:
            return no_advantage.all(dim=1) | no_weight.all(dim=1)
        return (no_advantage | no_weight).all(dim=1)


def _current_value(coefficient: float | Callable[[], float]) -> float:
    return coefficient() if callable(coefficient) else coefficient


def _clipped_tokens(metrics: Mapping[str, Tensor], mask: Tensor) -> Tensor | None:
    """(B, T) bool, from the metrics ``clip_*`` of a policy loss; None where it has none."""
    marks = [values > 0 for name, values in metrics.items() if name.startswith("clip_")]
    if not marks:
        return None
    clipped = torch.zeros_like(mask)
    for mark in marks:
        clipped = clipped | mark
    return clipped & mask


def _zero_padding(policy: PolicyTokens, batch: TrainBatch) -> tuple[PolicyTokens, TrainBatch]:
    """Zeros where the mask is off, in all tensors that a method may read.

    The backward pass of ``apply_mask`` writes zeros there too, so that padding receives no gradient from any
    method. The batch needs this as well: the value of a sequence times a NaN weight in a padded column would
    make the gradient of the whole row NaN.
    """
    mask = batch.mask
    cleaned_policy = dataclasses.replace(
        policy,
        logp=apply_mask(policy.logp, mask),
        entropy=None if policy.entropy is None else apply_mask(policy.entropy, mask),
        extra={name: apply_mask(values, mask) for name, values in policy.extra.items()},
    )
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    per_token = {
        name: value
        for name, value in fields.items()
        if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    }
    extra = {name: apply_mask(value, mask) for name, value in batch.extra.items()}
    cleaned = {name: apply_mask(value, mask) for name, value in per_token.items()}
    return cleaned_policy, batch.replace(**cleaned, extra=extra)


def _token_share(values: Tensor, mask: Tensor, totals: StepTotals) -> Tensor:
    with torch.no_grad():
        return masked_sum(values.detach().expand(mask.shape), mask) / max(totals.tokens, 1)
