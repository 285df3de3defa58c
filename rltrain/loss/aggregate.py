"""Aggregates reduce per-token losses to a micro-batch's share of the update's loss.

``(per_token (B, T) or (B, 1), mask (B, T), totals) -> scalar``. Sums run over this micro-batch, denominators
come from ``totals`` over the whole update: the shares of any split add up to the loss of the whole. Rows
without a masked-in token enter no sum and no count.
"""

from __future__ import annotations

from torch import Tensor

from rltrain.needs import EQUAL_SEQUENCES
from rltrain.registry import method
from rltrain.tensor_ops import masked_mean, masked_sum
from rltrain.types.policy import StepTotals

__all__ = ["dr_grpo", "seq_mean_token_mean", "seq_mean_token_sum", "token_mean"]


@method("token_mean", arxiv="2503.14476")
def token_mean(per_token: Tensor, mask: Tensor, totals: StepTotals) -> Tensor:
    """Every token of the update weighs the same, so long completions weigh more (DAPO, arXiv:2503.14476).

    Formula: ``sum_i sum_t l / sum_i |y_i|``
    """
    return masked_sum(per_token.expand(mask.shape), mask) / max(totals.tokens, 1)


@method("seq_mean_token_mean", arxiv="2402.03300", traits={EQUAL_SEQUENCES})
def seq_mean_token_mean(per_token: Tensor, mask: Tensor, totals: StepTotals) -> Tensor:
    """Mean over each completion, then over completions: every completion weighs the same (GRPO,
    arXiv:2402.03300).

    Formula: ``sum_i (sum_t l / |y_i|) / B``
    """
    return masked_mean(per_token.expand(mask.shape), mask, dim=1).sum() / max(totals.sequences, 1)


@method("seq_mean_token_sum")
def seq_mean_token_sum(per_token: Tensor, mask: Tensor, totals: StepTotals) -> Tensor:
    """Sum over each completion, mean over completions: textbook REINFORCE on a sequence's log-probability.

    Formula: ``sum_i sum_t l / B``
    """
    return masked_sum(per_token.expand(mask.shape), mask) / max(totals.sequences, 1)


@method("dr_grpo", arxiv="2503.20783")
def dr_grpo(per_token: Tensor, mask: Tensor, totals: StepTotals) -> Tensor:
    """Sum over each completion divided by a constant, mean over completions, arXiv:2503.20783.

    Formula: ``sum_i sum_t l / (B max_tokens)``

    The constant ``totals.max_tokens`` is rollout.max_tokens, not the padded width, which changes from batch
    to batch (verl's default). The mean divides by the number of completions, which verl's
    ``seq-mean-token-sum-norm`` does not do.
    """
    return masked_sum(per_token.expand(mask.shape), mask) / max(totals.sequences * totals.max_tokens, 1)
