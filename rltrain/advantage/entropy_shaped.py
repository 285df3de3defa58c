"""Advantages from entropies and log-probs: GTPO and GRPO-S distribute an outcome by entropy, EM-RL needs no
outcome at all.

All read the entropies and log-probs of the policy that sampled (``old_entropy``, ``old_logp``), detached.
Rows that could not be graded (NaN) and rows without a masked-in token enter no statistic and have advantage
0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import rloo
from rltrain.needs import MASK, OLD_ENTROPY, OLD_LOGP
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, masked_mean, masked_sum, token_moments

__all__ = ["em_rl", "grpo_s", "gtpo"]


@method("gtpo", arxiv="2508.04349", needs={MASK, OLD_ENTROPY})
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
    """GTPO: a reward for each token, larger for uncertain tokens of right answers and for certain ones of
    wrong answers, arXiv:2508.04349 (other papers use the name too). Returns (B, T).

    Formula: ``(x - mean) / sqrt(var + eps)`` over the prompt's tokens; right: ``x = alpha1 + alpha2 d H / sum
    H``, wrong: ``x = -alpha1 - alpha2 h (1/H) / sum 1/H``

    Sums run over the d right (h wrong) completions of the prompt that have a token at that position.
    normalise: over right and wrong answers together ("joint"), or separately ("separate", the paper's
    equation as it is usually read). "separate" loses the sign of the outcome: the tokens of right answers
    average 0 and their confident half is pushed down; so "joint" is the default. ``correct`` says which
    answers are right; without it, a reward above 0 does. The size of the reward does not matter. Entropies
    are clamped to [entropy_min, entropy_max] (nats), because values near 0 would dominate 1/H. With alpha1 +
    alpha2 = 1 the reward of a position is conserved; the paper uses 1 and 0.1.
    """
    counted = mask.bool() & ~rewards.isnan()[:, None]
    entropy = old_entropy.detach().clamp(entropy_min, entropy_max)
    return _shape_rewards(_right(rewards, correct), group, entropy, counted, alpha1, alpha2, normalise, eps)


@method("grpo_s", arxiv="2508.04349", needs={MASK, OLD_ENTROPY})
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

    Formula: ``(x - mean) / sqrt(var + eps)`` over the prompt's completions; right: ``x = beta1 + beta2 n H /
    sum H``, wrong: ``x = -beta1 - beta2 m (1/H) / sum 1/H``

    H is a completion's mean entropy; the sums run over the prompt's n right or m wrong completions.
    normalise, entropy_min and entropy_max as in ``gtpo``; the last two bound the mean entropy. Pair it with
    the loss ``grpo_s``, whose ratio is the arithmetic mean over a sequence.
    """
    counted = mask.bool().any(1) & ~rewards.isnan()
    # A completion is treated as one long token.
    entropy = masked_mean(old_entropy.detach(), mask, dim=1).clamp(entropy_min, entropy_max)
    return _shape_rewards(
        _right(rewards, correct), group, entropy[:, None], counted[:, None], beta1, beta2, normalise, eps
    )[:, 0]


@method("em_rl", arxiv="2505.15134", needs={MASK, OLD_LOGP, OLD_ENTROPY})
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

    Formula: ``c - mean of the other c`` of the prompt, with ``c = sum_t ln pi_old``, or ``-sum_t H``

    reward "sequence": the completion's log-probability, summed over its tokens. "token": minus the sum of its
    token entropies. Both grow as completions get shorter: watch the length, and stop by held-out prompts. The
    recipe's rewards are not used, except that rows with reward NaN are left out. Raises ValueError for a
    group of one completion, like ``rloo``.
    """
    certainty = masked_sum(old_logp if reward == "sequence" else -old_entropy, mask, dim=1)
    return rloo(torch.where(mask.bool().any(1) & ~rewards.isnan(), certainty.detach(), torch.nan), group)


def _right(rewards: Tensor, correct: Tensor | None) -> Tensor:
    """(B,) bool: the raw correctness if a reward function reports it, else whether the reward is above 0."""
    if correct is None:
        return rewards > 0
    return torch.where(correct.isnan(), rewards > 0, correct > 0)


def _shape_rewards(
    right: Tensor,
    group: Tensor,
    entropy: Tensor,
    counted: Tensor,
    outcome: float,
    spread: float,
    normalise: str,
    eps: float,
) -> Tensor:
    """(B, T) normalised rewards where ``counted (B, T)``: ``outcome`` for a right row (B,), plus ``spread``
    distributed by entropy.
    """
    share = torch.where(right[:, None], entropy, 1 / entropy)
    side = 2 * torch.unique(group, return_inverse=True)[1] + right.to(torch.int64)
    shaped = outcome + spread * _relative_to_column_mean(share, counted, side)
    shaped = torch.where(right[:, None], shaped, -shaped)
    centred, variance = token_moments(shaped, counted, side // 2 if normalise == "joint" else side)
    return apply_mask(centred / (variance + eps).sqrt()[:, None], counted)


def _relative_to_column_mean(share: Tensor, counted: Tensor, side: Tensor) -> Tensor:
    """(B, T) share divided by its mean at the same position over the rows of the same side (B,) that have a
    token there; 0 elsewhere.

    This is the paper's ``d share / sum(share)``, with d the number of those rows.
    """
    inverse = torch.unique(side, return_inverse=True)[1]
    blank = torch.zeros(
        int(inverse.max()) + 1 if len(inverse) else 0, share.shape[1], dtype=share.dtype, device=share.device
    )
    total = blank.index_add(0, inverse, apply_mask(share, counted))
    alive = blank.index_add(0, inverse, counted.to(share.dtype))
    return apply_mask(
        share * alive[inverse] / total[inverse].clamp(min=torch.finfo(share.dtype).tiny), counted
    )
