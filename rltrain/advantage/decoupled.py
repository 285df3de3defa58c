"""GDPO: every reward function normalised by itself before they are added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import group_norm, whiten
from rltrain.needs import MASK, PARTS
from rltrain.registry import method

__all__ = ["gdpo"]


@method("gdpo", arxiv="2601.05242", needs={MASK, PARTS})
def gdpo(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    parts: Mapping[str, Tensor],
    weights: dict[str, float] | None = None,
    whiten_over: Literal["completions", "tokens"] = "completions",
    eps: float = 1e-6,
) -> Tensor:
    """GDPO: each reward function is standardised over the prompt by itself, then they are summed and
    whitened, arXiv:2601.05242. Returns (B,), or (B, T).

    Formula: ``whiten(sum_k weights_k (R_k - mean_k) / (std_k + eps))`` over the step, for reward functions k

    Added up first, two functions with different spreads would be one: combinations that should differ get the
    same advantage. weights: of the functions by their names in the step's parts, 1 where none is given; the
    weights of reward.functions are not used. whiten_over: statistics over completions as in the paper, or
    over tokens as in verl. eps: of the groups' standard deviations. Raises ValueError unless there are parts
    of several functions.
    """
    names = [name for name in parts if "/" not in name and name != "correct"]
    unknown = sorted(set(weights or {}) - set(names))
    if len(names) < 2 or unknown:
        problem = f"weights name {unknown[0]!r}" if unknown else f"the step has {len(names)} reward functions"
        raise ValueError(
            f"gdpo: {problem}; it adds up what at least two functions give, here {', '.join(names) or 'none'}"
        )
    total = torch.zeros_like(rewards)
    for name in names:
        values = torch.where(rewards.isnan(), torch.nan, parts[name].to(rewards.dtype))
        total = total + (weights or {}).get(name, 1.0) * group_norm(values, group, eps=eps)
    graded = ~rewards.isnan()
    if whiten_over == "tokens":
        return whiten(total[:, None].expand(mask.shape), mask.bool() & graded[:, None], 1e-8)
    return whiten(total[:, None], graded[:, None], 1e-8)[:, 0]
