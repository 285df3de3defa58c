"""HAPO's advantage: the group's mean and spread over tokens, where GRPO takes them over completions."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.advantage.group import as_float, group_norm
from rltrain.needs import MASK
from rltrain.registry import method
from rltrain.tensor_ops import segment_mean, token_moments

__all__ = ["hapo"]


@method("hapo", arxiv="2509.16591", needs={MASK})
def hapo(
    rewards: Tensor, group: Tensor, *, mask: Tensor, eps: float = 1e-6, limit: float | None = 5.0
) -> Tensor:
    """HAPO's group average: GRPO's, taken over the prompt's tokens, arXiv:2509.16591. Returns (B,).

    Formula: ``(R - mean) / (std + eps)``, mean and std over the prompt's tokens

    Every token carries its completion's reward, so long completions weigh more and a prompt's advantages add
    up to 0 over its tokens. The standard deviation is the population's. A prompt with an advantage of
    ``limit`` or more in absolute value (a short completion unlike all others) gets GRPO's advantages instead,
    as released; with None no prompt does. Only masked-in tokens decide this (the release also reads padding,
    where the reward is 0). Ungraded rows and rows without a token get 0.
    """
    counted = mask.bool().any(1) & ~rewards.isnan()
    values = as_float(rewards)
    valid = mask.bool() & counted[:, None]
    spread = values[:, None].expand(mask.shape)
    centred, variance = token_moments(spread, valid, group)
    row = torch.where(valid, centred, torch.zeros_like(centred)).sum(1) / valid.sum(1).clamp(min=1)
    advantages = row / (variance.sqrt() + eps)
    if limit is None:
        return advantages
    is_extreme = segment_mean((advantages.abs() >= limit).to(values.dtype), group) > 0
    grpo_advantages = group_norm(torch.where(counted, values, torch.nan), group, ddof=1, eps=eps)
    return torch.where(is_extreme, grpo_advantages, advantages)
