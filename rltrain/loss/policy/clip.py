"""Token-level policy gradients: the plain one, and the clipped surrogate, also asymmetric and dual."""

from __future__ import annotations

import torch

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio
from rltrain.needs import OLD_LOGP, ON_POLICY_ONLY, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["clip", "reinforce"]


@method("clip", arxiv="1707.06347", needs={OLD_LOGP}, traits={OWNS_CLIPPING})
def clip(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> TokenLoss:
    """PPO's clipped surrogate, arXiv:1707.06347. Values (B, T).

    Formula: ``max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high))``

    eps_high above eps_low is DAPO's clip-higher (arXiv:2503.14476). dual_clip c bounds the loss of a token
    with A < 0 by -A c (arXiv:1912.09729; verl uses 3, its scripts often 10). delta caps the unclipped branch
    at ``min(r, delta)`` (arXiv:2505.07291, TRL): for delta > 1 + eps_high it equals dual_clip. ln r is
    clamped to +-20 before exp, as in verl. With one update per rollout r is 1 and nothing is clipped.
    """
    log_r = log_ratio(policy, batch)
    r = log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    advantages = batch.advantages
    unclipped = r if delta is None else r.clamp(max=delta)
    values = torch.maximum(-advantages * unclipped, -advantages * r.clamp(1 - eps_low, 1 + eps_high))
    if dual_clip is not None:
        values = torch.where(advantages < 0, torch.minimum(values, -advantages * dual_clip), values)

    ratio_value = r.detach()
    metrics = {
        "approx_kl": approx_kl(log_r),
        "clip_high": ((ratio_value > 1 + eps_high) & (advantages > 0)).to(ratio_value.dtype),
        "clip_low": ((ratio_value < 1 - eps_low) & (advantages < 0)).to(ratio_value.dtype),
    }
    bounds = [bound for bound in (dual_clip, delta) if bound is not None]
    if bounds:
        metrics["clip_dual"] = ((ratio_value > min(bounds)) & (advantages < 0)).to(ratio_value.dtype)
    return TokenLoss(apply_mask(values, batch.mask), metrics)


@method("reinforce", traits={ON_POLICY_ONLY})
def reinforce(policy: PolicyTokens, batch: TrainBatch) -> TokenLoss:
    """The policy gradient itself (Williams 1992).

    Formula: ``-A ln pi``

    Values (B, T). It has no ratio, so it is correct for one update per rollout only.
    """
    return TokenLoss(apply_mask(-batch.advantages * apply_mask(policy.logp, batch.mask), batch.mask))
