"""Losses that bound how far a token's probability moves, by its divergence or by a square: DPPO and DRO."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio
from rltrain.needs import ACTS_EVERYWHERE, OLD_LOGP, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["dppo", "dro"]

_EPS = 1e-8  # of the probability that a token is not drawn, as released


@method("dppo", arxiv="2602.04879", needs={OLD_LOGP}, traits={OWNS_CLIPPING})
def dppo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> TokenLoss:
    """DPPO: the policy gradient without the tokens whose probability has moved too far in the direction of A,
    arXiv:2602.04879. Values (B, T).

    Formula: ``-sg[min(r, cap)] A ln pi``, 0 if A > 0, pi > pi_old and D > high, or A <= 0, pi < pi_old and D
    > low; ``D = |pi - pi_old|`` or ``pi_old ln(pi_old / pi) + (1 - pi_old) ln((1 - pi_old) / (1 - pi))``

    divergence: of the event that this token is drawn, the total variation |pi - pi_old| ("tv") or the KL of
    two coins ("kl"). high bounds it for A > 0, low for A < 0; 0.2 is meant for "tv", the paper takes 0.05 for
    "kl". A ratio would let a rare token hardly move and a frequent one move far. The paper compares with the
    engine's log-probs: set rollout.trust_logp.
    """
    log_r = log_ratio(policy, batch).detach()
    r = log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    assert batch.old_logp is not None
    logp = apply_mask(policy.logp, batch.mask)
    old = apply_mask(batch.old_logp, batch.mask)
    moved = logp.detach().exp() - old.exp()
    distance = moved.abs() if divergence == "tv" else _coin_kl(old, logp.detach())
    advantages = batch.advantages
    too_high = (advantages > 0) & (moved > 0) & (distance > high)
    too_low = (advantages <= 0) & (moved < 0) & (distance > low)
    values = -r.clamp(max=cap) * advantages * logp
    values = torch.where(too_high | too_low, 0.0, values)
    metrics = {
        "approx_kl": approx_kl(log_r),
        "clip_high": too_high.to(r.dtype),
        "clip_low": too_low.to(r.dtype),
    }
    return TokenLoss(apply_mask(values, batch.mask), metrics)


def _coin_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL of a coin with ln p = ``old`` from one with ln p = ``new``."""
    p = old.exp()
    rest = ((1 - p + _EPS) / (1 - new.exp() + _EPS)).log()
    return p * (old - new) + (1 - p) * rest


@method("dro", arxiv="2405.19107", needs={OLD_LOGP}, traits={ACTS_EVERYWHERE})
def dro(policy: PolicyTokens, batch: TrainBatch, *, beta: float = 1.0) -> TokenLoss:
    """DRO: the policy gradient with a square in place of clipping, arXiv:2405.19107. Values (B, T).

    Formula: ``-A ln pi + beta / 2 (ln pi - ln pi_old)^2``

    Without a ratio's variance it can learn from old samples. beta: weight of the square; the paper's is 1.
    The paper's reference is a fixed policy and its advantage comes from a learned value; verl, whose form
    this is, takes the old policy and any advantage.
    """
    log_r = log_ratio(policy, batch)
    values = -batch.advantages * apply_mask(policy.logp, batch.mask) + 0.5 * beta * log_r.square()
    return TokenLoss(apply_mask(values, batch.mask), {"approx_kl": approx_kl(log_r)})
