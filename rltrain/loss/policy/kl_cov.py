"""KL-Cov's loss: the plain ratio surrogate with a penalty on the tokens that its control marked."""

from __future__ import annotations

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio, policy_statistic
from rltrain.needs import ACTS_ON_MARKS, CONTROL, OLD_LOGP, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["kl_cov"]


@method(
    "kl_cov",
    arxiv="2505.22617",
    needs={OLD_LOGP},
    traits={OWNS_CLIPPING, CONTROL("kl_cov"), ACTS_ON_MARKS},
)
def kl_cov(policy: PolicyTokens, batch: TrainBatch, *, beta: float = 1.0) -> TokenLoss:
    """KL-Cov: the policy gradient with a penalty on the tokens that the control ``kl_cov`` marked in
    ``extra["kl_cov"]``, arXiv:2505.22617. Values (B, T).

    Formula: ``-A r + beta mark |ln r|``

    The paper writes the penalty as a KL divergence between the old and the current policy, its code as the
    absolute log-ratio, which is used here. Nothing is clipped (ln r is clamped to +-20 before exp): watch
    approx_kl if a step makes many updates. While the current policy is still the old one (in a step's first
    update) the penalty's gradient is 0, not the sign of a rounding error.
    """
    log_r = log_ratio(policy, batch)
    marks = policy_statistic(batch, "kl_cov", "kl_cov")
    has_moved = batch.mask
    if batch.logp_now is not None and batch.old_logp is not None:
        has_moved = batch.logp_now != batch.old_logp
    penalty = marks * apply_mask(log_r, has_moved).abs()
    values = -batch.advantages * log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() + beta * penalty
    return TokenLoss(
        apply_mask(values, batch.mask),
        {"approx_kl": approx_kl(log_r), "kl_cov_penalty": apply_mask(penalty.detach(), batch.mask)},
    )
