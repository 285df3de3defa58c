"""Losses with one importance ratio per sequence.

Values (B, 1): pair them with an aggregate that weighs sequences equally.
"""

from __future__ import annotations

import torch

from rltrain.loss.policy.ratio import approx_kl, log_ratio, sequence_advantage
from rltrain.needs import OLD_LOGP, OWNS_CLIPPING, SEQUENCE_LEVEL
from rltrain.registry import method
from rltrain.tensor_ops import masked_mean
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["gmpo", "gspo", "luspo"]

LOG_SEQUENCE_RATIO_LIMIT = 10.0  # verl's bound on ln s; beyond it a sequence has no gradient


@method("gspo", arxiv="2507.18071", needs={OLD_LOGP}, traits={OWNS_CLIPPING, SEQUENCE_LEVEL})
def gspo(
    policy: PolicyTokens, batch: TrainBatch, *, eps_low: float = 3e-4, eps_high: float = 4e-4
) -> TokenLoss:
    """PPO's surrogate on the geometric-mean ratio of a sequence, arXiv:2507.18071. Values (B, 1).

    Formula: ``max(-A s, -A clip(s, 1 - eps_low, 1 + eps_high))``, ``s = exp(mean_t ln r)``

    s changes far less than a token's ratio: with 0.2 nothing would ever be clipped. ln s is bounded by 10 as
    in verl. If advantages differ within a sequence their mean is taken.
    """
    log_r = log_ratio(policy, batch)
    s = masked_mean(log_r, batch.mask, dim=1)[:, None].clamp(max=LOG_SEQUENCE_RATIO_LIMIT).exp()
    advantage = sequence_advantage(batch)
    values = torch.maximum(-advantage * s, -advantage * s.clamp(1 - eps_low, 1 + eps_high))
    ratio_value = s.detach()
    metrics = {
        "approx_kl": approx_kl(log_r),
        "clip_high": ((ratio_value > 1 + eps_high) & (advantage > 0)).to(ratio_value.dtype),
        "clip_low": ((ratio_value < 1 - eps_low) & (advantage < 0)).to(ratio_value.dtype),
    }
    return TokenLoss(values, metrics)


@method("luspo", arxiv="2602.05261", needs={OLD_LOGP}, traits={OWNS_CLIPPING, SEQUENCE_LEVEL})
def luspo(
    policy: PolicyTokens, batch: TrainBatch, *, eps_low: float = 3e-4, eps_high: float = 4e-4
) -> TokenLoss:
    """LUSPO: GSPO's loss times the completion's length, arXiv:2602.05261. Values (B, 1).

    Formula: ``|y| max(-A s, -A clip(s, 1 - eps_low, 1 + eps_high))``, ``s = exp(mean_t ln r)``

    GSPO's gradient of a token is divided by the length, so that long completions learn less; here every token
    counts the same. eps_low and eps_high as in ``gspo``.
    """
    sequence = gspo(policy, batch, eps_low=eps_low, eps_high=eps_high)
    length = batch.mask.sum(dim=1, keepdim=True).to(sequence.values.dtype)
    return TokenLoss(sequence.values * length, sequence.metrics)


@method("gmpo", arxiv="2507.20673", needs={OLD_LOGP}, traits={OWNS_CLIPPING, SEQUENCE_LEVEL})
def gmpo(
    policy: PolicyTokens, batch: TrainBatch, *, eps_low: float = 0.4, eps_high: float = 0.4
) -> TokenLoss:
    """GMPO: the geometric mean of token ratios, each clipped in log space, arXiv:2507.20673. Values (B, 1).

    Formula: ``-A exp(mean_t c)``, ``c = sign(A) min(sign(A) ln r, sign(A) clip(ln r, -eps_low, eps_high))``

    As in PPO, a token is clipped only if its ratio has already moved in the direction of its advantage.
    """
    log_r = log_ratio(policy, batch)
    sign = batch.advantages.sign()
    bounded = sign * torch.minimum(sign * log_r, sign * log_r.clamp(-eps_low, eps_high))
    rho = masked_mean(bounded, batch.mask, dim=1)[:, None].exp()
    ratio_value = log_r.detach()
    metrics = {
        "approx_kl": approx_kl(log_r),
        "clip_high": ((ratio_value > eps_high) & (sign > 0)).to(ratio_value.dtype),
        "clip_low": ((ratio_value < -eps_low) & (sign < 0)).to(ratio_value.dtype),
    }
    return TokenLoss(-sequence_advantage(batch) * rho, metrics)
