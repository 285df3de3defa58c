"""CE-GPPO: tokens outside the clip range keep a bounded gradient, with a separate strength for each side."""

from __future__ import annotations

import torch

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio
from rltrain.needs import OFF_POLICY_ONLY, OLD_LOGP, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["ce_gppo"]


@method("ce_gppo", arxiv="2509.20712", needs={OLD_LOGP}, traits={OWNS_CLIPPING, OFF_POLICY_ONLY})
def ce_gppo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    beta1: float = 0.25,
    beta2: float = 1.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> TokenLoss:
    """CE-GPPO: the policy gradient inside the clip range, a gradient of constant size outside,
    arXiv:2509.20712. Values (B, T).

    Formula: ``-A r``; ``-beta1 (1 - eps_low) A r / sg[r]`` if A < 0 and r < 1 - eps_low; ``-beta2 (1 +
    eps_high) A r / sg[r]`` if A > 0 and r > 1 + eps_high

    A larger beta1 makes the entropy fall faster, a larger beta2 slower. Defaults are those of the authors'
    function; their scripts use beta1 0.75 (7B) or 0.5 (1.5B) and dual_clip 10. With betas of 1 and 1 the
    values are PPO's, with 0 and 0 the gradients are; values of clipped tokens are not comparable between
    settings. dual_clip bounds the loss of a token with A < 0 by -A dual_clip. r / sg[r] is computed from
    log-probs and cannot overflow. GPPO (arXiv:2508.07629) is beta1 = beta2 = 1.
    """
    log_r = log_ratio(policy, batch)
    r = log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unit_ratio = (log_r - log_r.detach()).exp()  # r / sg[r]
    advantages = batch.advantages
    ratio_value = r.detach()
    low = (advantages < 0) & (ratio_value < 1 - eps_low)
    high = (advantages > 0) & (ratio_value > 1 + eps_high)
    factor = torch.where(
        low, beta1 * (1 - eps_low) * unit_ratio, torch.where(high, beta2 * (1 + eps_high) * unit_ratio, r)
    )
    values = -advantages * factor
    metrics = {"approx_kl": approx_kl(log_r), "clip_high": high.to(r.dtype), "clip_low": low.to(r.dtype)}
    if dual_clip is not None:
        values = torch.where(advantages < 0, torch.minimum(values, -advantages * dual_clip), values)
        metrics["clip_dual"] = ((ratio_value > dual_clip) & (advantages < 0)).to(r.dtype)
    return TokenLoss(apply_mask(values, batch.mask), metrics)
