"""AOT: the chosen answers' margins as a distribution that must lie above another one.

The quantiles of the optimizer batch are compared rank by rank. Ranks are those of the policy just before the
update, which is the policy of the gradient.
"""

from __future__ import annotations

from torch import Tensor

from rltrain.loss.preference.dpo import soft_logistic
from rltrain.loss.preference.ratio import log_ratios, pair_metrics
from rltrain.loss.preference.statistics import statistic
from rltrain.needs import PAIRS, REF_LOGP, REFERENCE_MARGIN_AT_RANK, REJECTED_AT_RANK
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["aot", "aot_unpaired"]


@method("aot", arxiv="2406.05882", needs={REF_LOGP, REFERENCE_MARGIN_AT_RANK}, traits={PAIRS})
def aot(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, flip_rate: float = 0.0) -> ExampleLoss:
    """AOT on pairs: the k-th smallest margin of the policy's log-probs against the k-th smallest of the
    reference's, arXiv:2406.05882. Values (N,).

    Formula: ``-(1 - e) ln sigmoid(x) - e ln sigmoid(-x)``, ``x = beta (m_k - n_k)``: the k-th smallest ``ln
    pi(w) - ln pi(l)`` and the k-th smallest of the reference

    Each value is DPO's with another pair's reference margin. beta as in ``dpo``; flip_rate as in ``cdpo``, 0
    for certain labels. The larger the optimizer batch, the closer its order statistics are to the quantiles.
    """
    margin = policy.chosen.logp - policy.rejected.logp
    reference = statistic(batch, "reference_margin_at_rank", "aot").to(margin.dtype)
    chosen, rejected = log_ratios(policy, batch)
    values = soft_logistic(beta * (margin - reference), 1 - flip_rate)
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected))


@method("aot_unpaired", arxiv="2406.05882", needs={REF_LOGP, REJECTED_AT_RANK}, traits={PAIRS})
def aot_unpaired(
    policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, flip_rate: float = 0.0
) -> ExampleLoss:
    """AOT without pairs: the k-th smallest log-ratio of the chosen answers against the k-th smallest of the
    rejected ones, arXiv:2406.05882. Values (N,).

    Formula: ``-(1 - e) ln sigmoid(x) - e ln sigmoid(-x)``, ``x = beta (a_k - b_k)``: the k-th smallest u_w
    and the k-th smallest u_l

    The answer of the same rank belongs to another row, so that its log-ratio is a number here and its own
    gradient is taken in its row: the values and the gradient of their sum are those of the sorted batch. beta
    and flip_rate as in ``aot``.
    """
    chosen, rejected = log_ratios(policy, batch)
    opponents = statistic(batch, "rejected_at_rank", "aot_unpaired").to(chosen.dtype)
    of_chosen = opponents[:, 0]
    of_rejected = opponents[:, 1]
    values = soft_logistic(beta * (chosen - of_chosen), 1 - flip_rate)
    other_side = soft_logistic(beta * (of_rejected - rejected), 1 - flip_rate)
    values = values + _gradient_only(other_side)
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected))


def _gradient_only(values: Tensor) -> Tensor:
    """0, with the gradient of ``values``."""
    return values - values.detach()
