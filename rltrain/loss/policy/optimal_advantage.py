"""A*-PO: regression of a completion's log-ratio on its advantage over the optimal value."""

from __future__ import annotations

from rltrain.loss.policy.ratio import sequence_advantage
from rltrain.needs import ACTS_EVERYWHERE, REF_LOGP, SEQUENCE_LEVEL
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, masked_sum
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["a_star_po"]


@method("a_star_po", arxiv="2505.20686", needs={REF_LOGP}, traits={SEQUENCE_LEVEL, ACTS_EVERYWHERE})
def a_star_po(policy: PolicyTokens, batch: TrainBatch, *, beta: float = 1e-3) -> TokenLoss:
    """A*-PO: each completion's log-ratio to the reference is regressed on its advantage, arXiv:2505.20686.
    Values (B, 1).

    Formula: ``(beta ln[pi(y|x) / pi_ref(y|x)] - A)^2``

    The log-ratio is a sum over the completion's tokens. beta: weight of the KL, beta_2 of the paper. A is
    that of the advantage ``optimal_value``. There is no ratio to clip; a completion with A = 0 has a gradient
    too, towards the reference.
    """
    if batch.ref_logp is None:
        raise ValueError("the a_star_po loss needs ref_logp, which the batch lacks")
    log_ratios = apply_mask(policy.logp - batch.ref_logp, batch.mask)
    implicit = beta * masked_sum(log_ratios, batch.mask, dim=1)[:, None]
    values = (implicit - sequence_advantage(batch)).square()
    return TokenLoss(values, {"implicit_reward": implicit.detach()})
