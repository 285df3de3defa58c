"""GRPO-S's loss: one ratio per sequence, the arithmetic mean of its token ratios."""

from __future__ import annotations

import torch

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio, sequence_advantage
from rltrain.needs import OLD_LOGP, OWNS_CLIPPING, SEQUENCE_LEVEL
from rltrain.registry import method
from rltrain.tensor_ops import masked_mean
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["grpo_s"]


@method("grpo_s", arxiv="2508.04349", needs={OLD_LOGP}, traits={OWNS_CLIPPING, SEQUENCE_LEVEL})
def grpo_s(
    policy: PolicyTokens, batch: TrainBatch, *, eps_low: float = 0.2, eps_high: float = 0.2
) -> TokenLoss:
    """PPO's surrogate on the mean ratio of a sequence, arXiv:2508.04349. Values (B, 1).

    Formula: ``max(-A w, -A clip(w, 1 - eps_low, 1 + eps_high))``, ``w = mean_t r``

    w is the arithmetic mean of the token ratios, which a single large ratio can move; ``gspo`` takes the
    geometric mean. ln r is clamped to +-20 first. The advantage is ``grpo_s``; if it differs within a
    sequence its mean is taken.
    """
    log_r = log_ratio(policy, batch)
    w = masked_mean(log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), batch.mask, dim=1)[:, None]
    advantage = sequence_advantage(batch)
    values = torch.maximum(-advantage * w, -advantage * w.clamp(1 - eps_low, 1 + eps_high))
    ratio_value = w.detach()
    metrics = {
        "approx_kl": approx_kl(log_r),
        "clip_high": ((ratio_value > 1 + eps_high) & (advantage > 0)).to(ratio_value.dtype),
        "clip_low": ((ratio_value < 1 - eps_low) & (advantage < 0)).to(ratio_value.dtype),
    }
    return TokenLoss(values, metrics)
