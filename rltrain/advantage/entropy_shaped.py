"""Advantages made of entropies and log-probs: GTPO and GRPO-S spread an outcome by entropy, EM-RL needs no
outcome at all.

All read the policy that sampled (``old_entropy``, ``old_logp``), detached. Rows that could not be graded
(NaN) and rows without a masked-in token take no part in any statistic and have advantage 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import rloo
from rltrain.registry import method
from rltrain.tensor_ops import masked, masked_mean, masked_sum, token_moments

__all__ = ["em_rl", "grpo_s", "gtpo"]


@method("gtpo", arxiv="2508.04349", needs={"mask", "old_entropy"})
def gtpo(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    old_entropy: Tensor,
    correct: Tensor | None = None,
    alpha1: float = 1.0,
    alpha2: float = 0.1,
    normalise: Literal["joint", "separate"] = "joint",
    entropy_min: float = 1e-6,
    entropy_max: float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """GTPO: right answers earn ``alpha1 + alpha2 d H / sum H`` per token, wrong ones ``-alpha1 - alpha2 h
    (1/H) / sum 1/H``, arXiv:2508.04349 (other papers use the name too). Returns (B, T).

    Sums run over the d right (h wrong) completions of the prompt that have a token at that position. The
    shaped rewards are then normalised to ``(r - mean) / sqrt(var + eps)`` over the prompt's tokens.
    normalise: over right and wrong ones together ("joint"), or apart ("separate", the paper's equation as it
    is usually read). Apart, the outcome's sign is lost: the tokens of right answers average 0 and their
    confident half is pushed down; so together is the default. Right is what ``correct`` says, else a reward
    above 0; the reward's size does not count. Entropies are clamped to [entropy_min, entropy_max] (nats):
    those near 0 would dominate 1/H. With alpha1 + alpha2 = 1 the reward of a position is conserved; the paper
    takes 1 and 0.1.
    """
    counted, entropy = (
        mask.bool() & ~rewards.isnan()[:, None],
        old_entropy.detach().clamp(entropy_min, entropy_max),
    )
    return _shaped(_right(rewards, correct), group, entropy, counted, alpha1, alpha2, normalise, eps)


@method("grpo_s", arxiv="2508.04349", needs={"mask", "old_entropy"})
def grpo_s(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    old_entropy: Tensor,
    correct: Tensor | None = None,
    beta1: float = 1.0,
    beta2: float = 0.1,
    normalise: Literal["joint", "separate"] = "joint",
    entropy_min: float = 1e-6,
    entropy_max: float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """GRPO-S: ``gtpo`` with one reward per completion, from its mean entropy over its tokens,
    arXiv:2508.04349. Returns (B,).

    Right: ``beta1 + beta2 n H / sum H`` over the prompt's n right completions; wrong: ``-beta1 - beta2 m
    (1/H) / sum 1/H`` over its m wrong ones; then ``(r - mean) / sqrt(var + eps)`` over the prompt's
    completions. normalise, entropy_min and entropy_max as in ``gtpo``, the last two on the mean entropy. Its
    loss is ``grpo_s``, whose ratio is the arithmetic mean over a sequence.
    """
    counted = mask.bool().any(1) & ~rewards.isnan()
    entropy = masked_mean(old_entropy.detach(), mask, dim=1).clamp(
        entropy_min, entropy_max
    )  # a completion as one long token
    return _shaped(
        _right(rewards, correct), group, entropy[:, None], counted[:, None], beta1, beta2, normalise, eps
    )[:, 0]


@method("em_rl", arxiv="2505.15134", needs={"mask", "old_logp", "old_entropy"})
def em_rl(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    old_logp: Tensor,
    old_entropy: Tensor,
    reward: Literal["sequence", "token"] = "sequence",
) -> Tensor:
    """EM-RL: the model's own certainty as reward, with the leave-one-out baseline, arXiv:2505.15134. Returns
    (B,).

    reward "sequence": the completion's log-probability, sum over its tokens. "token": minus the sum of its
    token entropies. Both grow as completions get shorter: watch the length, and stop on held-out prompts. The
    recipe's own rewards are not looked at, but where they are NaN the row is left out. Raises ValueError for
    a group of one, as ``rloo``.
    """
    certainty = masked_sum(old_logp if reward == "sequence" else -old_entropy, mask, dim=1)
    return rloo(torch.where(mask.bool().any(1) & ~rewards.isnan(), certainty.detach(), torch.nan), group)


def _right(rewards: Tensor, correct: Tensor | None) -> Tensor:
    """(B,) bool: raw correctness where a reward function reports it, else whether the reward is above 0."""
    if correct is None:
        return rewards > 0
    return torch.where(correct.isnan(), rewards > 0, correct > 0)


def _shaped(
    right: Tensor,
    group: Tensor,
    entropy: Tensor,
    counted: Tensor,
    outcome: float,
    spread: float,
    normalise: str,
    eps: float,
) -> Tensor:
    """(B, T) normalised rewards where ``counted (B, T)``: ``outcome`` for being right (B,), and
    ``spread`` shared out by entropy.
    """
    share = torch.where(right[:, None], entropy, 1 / entropy)
    side = 2 * torch.unique(group, return_inverse=True)[1] + right.to(torch.int64)
    shaped = outcome + spread * _relative_to_column_mean(share, counted, side)
    shaped = torch.where(right[:, None], shaped, -shaped)
    centred, variance = token_moments(shaped, counted, side // 2 if normalise == "joint" else side)
    return masked(centred / (variance + eps).sqrt()[:, None], counted)


def _relative_to_column_mean(share: Tensor, counted: Tensor, side: Tensor) -> Tensor:
    """(B, T) share over its mean at the same position among the rows of the same side (B,) that reach it; 0
    elsewhere.

    ``d share / sum(share)`` of the paper, d being the number of those rows.
    """
    inverse = torch.unique(side, return_inverse=True)[1]
    blank = torch.zeros(
        int(inverse.max()) + 1 if len(inverse) else 0, share.shape[1], dtype=share.dtype, device=share.device
    )
    total = blank.index_add(0, inverse, masked(share, counted))
    alive = blank.index_add(0, inverse, counted.to(share.dtype))
    return masked(share * alive[inverse] / total[inverse].clamp(min=torch.finfo(share.dtype).tiny), counted)
