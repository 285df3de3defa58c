"""HAPO's surrogate: a token's clip range and advantage depend on its entropy signal."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio, policy_statistic
from rltrain.needs import CONTROL, OLD_LOGP, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["hapo", "hapo_bounds", "redistribute_advantages"]


@method("hapo", arxiv="2509.16591", needs={OLD_LOGP}, traits={OWNS_CLIPPING, CONTROL("hapo")})
def hapo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    alpha: float = 1.0,
    beta: float = 1.0,
    dual_clip: float | None = 10.0,
    zone: Literal["adapted", "base"] = "adapted",
) -> TokenLoss:
    """HAPO: PPO's surrogate with entropy-dependent clipping and advantages, arXiv:2509.16591. Values (B, T).

    Formula: ``max(-A' r, -A' clip(r, 1 - eps_low (1 - alpha min(h_hat, 0)), 1 + eps_high (1 + alpha
    max(h_hat, 0))))``; ``A' = A (1 + beta h_hat)`` for uncertain tokens outside the neutral zone and certain
    ones inside it, else A

    h_hat in [-1, 1] comes from the control ``hapo``. Certain tokens may be pushed further down, uncertain
    ones further up. The neutral zone is (1 - eps_low / 2, 1 + eps_high / 2). zone: it uses the adapted bounds
    ("adapted", as released), or eps_low and eps_high themselves ("base", the paper's second version).
    dual_clip as in ``clip``. The release clips at 0.2 and 0.2, the paper at 0.2 and 0.28. With alpha and beta
    0, or h_hat 0, this is ``clip``.
    """
    h_hat = policy_statistic(batch, "h_hat", "hapo")
    log_r = log_ratio(policy, batch)
    r = log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    ratio_value = r.detach()
    low, high = hapo_bounds(h_hat, eps_low, eps_high, alpha)
    zone_low = low if zone == "adapted" else torch.full_like(low, eps_low)
    zone_high = high if zone == "adapted" else torch.full_like(high, eps_high)
    advantages = redistribute_advantages(batch.advantages, h_hat, ratio_value, zone_low, zone_high, beta)
    values = torch.maximum(-advantages * r, -advantages * r.clamp(1 - low, 1 + high))
    if dual_clip is not None:
        values = torch.where(advantages < 0, torch.minimum(values, -advantages * dual_clip), values)
    metrics = {
        "approx_kl": approx_kl(log_r),
        "clip_high": ((ratio_value > 1 + high) & (advantages > 0)).to(ratio_value.dtype),
        "clip_low": ((ratio_value < 1 - low) & (advantages < 0)).to(ratio_value.dtype),
        "hapo_redistributed": (advantages != batch.advantages).to(ratio_value.dtype),
    }
    return TokenLoss(apply_mask(values, batch.mask), metrics)


def hapo_bounds(h_hat: Tensor, eps_low: float, eps_high: float, alpha: float) -> tuple[Tensor, Tensor]:
    """(B, T) each: how far below and above 1 a token's ratio may go."""
    unit = torch.ones_like(h_hat)
    low = eps_low * torch.where(h_hat <= 0, unit - alpha * h_hat, unit)
    high = eps_high * torch.where(h_hat > 0, unit + alpha * h_hat, unit)
    return low, high


def redistribute_advantages(
    advantages: Tensor, h_hat: Tensor, ratio: Tensor, low: Tensor, high: Tensor, beta: float
) -> Tensor:
    """(B, T) A (1 + beta h_hat) where h_hat > 0 outside the neutral zone or h_hat <= 0 inside it, else A."""
    neutral = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    return torch.where((h_hat > 0) != neutral, advantages * (1 + beta * h_hat), advantages)
