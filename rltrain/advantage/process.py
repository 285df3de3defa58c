"""Process rewards from log-ratios, and PRIME's returns.

An implicit process reward model is any causal model trained on outcomes (``loss/preference/prm.py``): with
``rho_t = log pi(y_t|..) - log pi_ref(y_t|..)`` a token earns ``beta rho_t``, and the running sum ``q_t`` is
the soft value of the text so far, ``beta log E_ref[exp(r / beta)]``, arXiv:2412.01981. Nothing here carries a
gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import returns, whiten
from rltrain.needs import MASK, PROCESS_REWARD
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, masked_mean, segment_count, segment_mean

__all__ = [
    "aggregate_steps",
    "contrast_accuracy",
    "is_accuracy_within",
    "prime",
    "step_rewards",
    "token_rewards",
]


def token_rewards(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """(B, T) ``beta (logp - ref_logp)`` of a process reward model and its reference, 0 where masked out."""
    return apply_mask(beta * (logp - ref_logp), mask).detach()


def step_rewards(rewards: Tensor, step_id: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) sum of the token rewards of each step, and (B, K) bool: the row has that step.

    step_id (B, T) int64: from 0 in each row, -1 outside the completion; a separator belongs to the step that
    it ends. The cumulative value after a step is the running sum of these; over all steps it is the
    response's reward, however the response was split into steps.
    """
    inside = step_id >= 0
    steps = int(step_id.max()) + 1 if step_id.numel() else 0
    column = step_id.clamp(min=0)
    if not steps:
        return rewards[:, :0], inside[:, :0]

    sums = rewards.new_zeros(len(rewards), steps).scatter_add(1, column, apply_mask(rewards, inside))
    tokens = torch.zeros(len(rewards), steps, dtype=torch.int64, device=rewards.device)
    return sums, tokens.scatter_add(1, column, inside.long()) > 0


def aggregate_steps(
    step: Tensor,
    present: Tensor,
    *,
    series: Literal["step", "cumulative"] = "step",
    reduction: Literal["min", "last", "sum", "mean"] = "min",
) -> Tensor:
    """(B,) one score per response from its step rewards (B, K); 0 for a response without steps,
    arXiv:2412.01981.

    series: the rewards themselves ("step"), or the cumulative values Q_k. ("step", "sum") and ("cumulative",
    "last") are the outcome score ``beta u(y)``. The authors' script reports min and sum of both series; which
    of these the paper's table shows was not verified.
    """
    values = step if series == "step" else apply_mask(step, present).cumsum(dim=1)
    has_steps = present.any(dim=1)
    if reduction == "sum":
        return apply_mask(values, present).sum(dim=1)
    if reduction == "mean":
        return masked_mean(values, present, dim=1)
    if not step.shape[1]:
        return values.sum(dim=1)
    if reduction == "min":
        scored = torch.where(present, values, torch.inf).amin(dim=1)
    else:
        position = torch.arange(step.shape[1], device=step.device)
        last = torch.where(present, position, -1).amax(dim=1).clamp(min=0)
        scored = values.gather(1, last[:, None])[:, 0]
    return torch.where(has_steps, scored, torch.zeros_like(scored))


@method("prime", arxiv="2502.01456", needs={MASK, PROCESS_REWARD})
def prime(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    process_reward: Tensor | None = None,
    baseline: Literal["others", "released"] = "others",
    scale: Literal["largest_return", "none"] = "largest_return",
    granularity: Literal["token", "whole"] = "token",
    process_weight: float = 1.0,
    outcome_weight: float = 1.0,
    process_gamma: float = 1.0,
    outcome_gamma: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """PRIME: leave-one-out returns of token rewards and of outcomes, summed and whitened over the step,
    arXiv:2502.01456.

    Formula: ``whiten(process_weight returns(q - mean of the others' q) + outcome_weight returns(R - mean of
    the others' R))``, ``returns(x)_t = sum_{s >= t} gamma^(s - t) x_s``, q token rewards, R on the last token

    Returns (B, T). process_reward (B, T) are the reward model's log-ratios; rewards (B,) are the outcomes,
    NaN where ungraded. baseline "others": a token's reward minus the mean, over the prompt's other answers,
    of their mean token reward (the paper). "released": the token's reward times n / (n - 1), minus the sum of
    all answers' means divided by n - 1 (the authors' code). For outcomes the two agree. scale: token rewards
    are divided by the largest |return| of the step (all ranks) plus 1e-6, or not. granularity "whole" puts
    the sum of a response's token rewards on its last token. process_weight and outcome_weight multiply the
    two parts; the released weights amount to 1 and 1. process_gamma and outcome_gamma are the discounts; eps
    as in ``reinforce_pp``. The only graded answer of a prompt gets 0 before whitening.
    """
    if process_reward is None:
        raise ValueError(
            "prime: process_reward was not computed; the recipe needs a process reward model that is trained "
            "along with the policy"
        )
    valid = mask.bool() & ~rewards.isnan()[:, None]
    last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    token = apply_mask(process_reward, valid).detach()
    if granularity == "whole":
        token = apply_mask(token.sum(dim=1, keepdim=True).expand(mask.shape), last)
    if scale == "largest_return":
        token = token / (returns(token, valid, 1.0).abs().max() + 1e-6)

    row_mean = masked_mean(token, valid, dim=1)
    others, siblings = _mean_of_others(row_mean, group, rewards)
    if baseline == "released":
        factor = torch.where(siblings > 0, (siblings + 1) / siblings.clamp(min=1), 0.0)[:, None]
        centred = token * factor - (others + row_mean / siblings.clamp(min=1))[:, None]
    else:
        centred = token - others[:, None]
    centred = apply_mask(centred, valid & (siblings > 0)[:, None])

    outcome = rewards.to(token.dtype).detach()
    outcome = torch.where(siblings > 0, outcome - _mean_of_others(outcome, group, rewards)[0], 0.0)

    total = process_weight * returns(centred, valid, process_gamma)
    total = total + outcome_weight * returns(
        apply_mask(outcome[:, None].expand(mask.shape), last), valid, outcome_gamma
    )
    return whiten(total, valid, eps)


def is_accuracy_within(correct: Tensor, group: Tensor, *, low: float = 0.2, high: float = 0.8) -> Tensor:
    """(B,) bool at every row: the share of right answers to its prompt lies in [low, high], both included,
    arXiv:2502.01456.

    correct (B,) is NaN for ungraded rows, which do not count. False for a prompt without a graded answer.
    """
    graded = ~correct.isnan()
    count = segment_mean(graded.double(), group)
    share = segment_mean(torch.where(graded, correct, 0.0).double(), group) / count.clamp(min=1e-300)
    return (count > 0) & (share >= low - 1e-9) & (share <= high + 1e-9)


def contrast_accuracy(score: Tensor, outcome: Tensor, group: Tensor) -> Tensor:
    """() how often a reward model orders two answers of a prompt as their outcomes do, averaged over prompts,
    arXiv:2502.01456.

    A pair is weighted by the difference of its outcomes; a prompt without any difference counts as 0.5. If
    two scores are equal the later row counts as the better one, as in the authors' code.
    """
    pairs = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
    first, second = pairs[:, group[pairs[0]] == group[pairs[1]]]
    gap = outcome[first] - outcome[second]
    agrees = ((score[first] > score[second]) == (gap > 0)).to(score.dtype)
    prompts, index = torch.unique(group, return_inverse=True)
    weight = score.new_zeros(len(prompts)).index_add(0, index[first], gap.abs())
    right = score.new_zeros(len(prompts)).index_add(0, index[first], agrees * gap.abs())
    return torch.where(weight > 0, right / weight.clamp(min=1e-300), 0.5).mean()


def _mean_of_others(values: Tensor, group: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean of ``values`` over the other graded rows of the group, and (B,) the number of those rows.

    Both are 0 if there are none.
    """
    graded = ~rewards.isnan()
    mean = torch.zeros_like(values)
    others = torch.zeros_like(values)
    kept = values[graded]
    ids = group[graded]
    count = segment_count(ids).to(values.dtype)
    centre = segment_mean(kept, ids)
    mean[graded] = torch.where(count > 1, centre - (kept - centre) / (count - 1).clamp(min=1), 0.0)
    others[graded] = count - 1
    return mean, others
