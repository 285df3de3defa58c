"""The number of a row that preference losses compare: its completion's log-prob or a scalar head's reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rltrain.config.schema import Model
from rltrain.learner.forward import PolicyForward
from rltrain.learner.micro_batches import RowBuilder, build_rows
from rltrain.learner.trained_model import load_policy
from rltrain.types.preference import PolicyPairs, PolicySequences, RewardPairs

__all__ = ["LOG_PROBS", "LossInputs", "RowScoring", "log_prob_inputs"]

LossInputs = PolicyPairs | PolicySequences | RewardPairs | Tensor


@dataclass(frozen=True)
class RowScoring:
    """Which kind of model is trained, its number for a row, and the form in which a loss takes that
    number.
    """

    load: Callable[[Model, torch.dtype], PreTrainedModel]  # for products in a dtype
    wrap: Callable[[PreTrainedModel], PolicyForward]
    statistic: str  # the statistic of the forward pass that gives the number
    row_numbers: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # (r,) float32, one for each row
    loss_inputs: Callable[[Tensor, int], LossInputs]  # from (R,) numbers and the rows per example
    build_rows: RowBuilder
    predicts_tokens: bool  # whether the model's output is a distribution over tokens, which has an entropy


def log_prob_inputs(logp: Tensor, sides: int) -> PolicyPairs | PolicySequences:
    """The log-probs (R,) of rows as a loss takes them. sides: rows per example."""
    if sides == 1:
        return PolicySequences(logp)
    chosen, rejected = logp.chunk(2) if len(logp) else (logp, logp)
    return PolicyPairs(PolicySequences(chosen), PolicySequences(rejected))


def _sums_over_tokens(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.sum(1) for name, values in statistics.items()}


LOG_PROBS = RowScoring(
    load=load_policy,
    wrap=PolicyForward,
    statistic="logp",
    row_numbers=_sums_over_tokens,
    loss_inputs=log_prob_inputs,
    build_rows=build_rows,
    predicts_tokens=True,
)
