"""Advantages from one reward per completion and the completions of the same prompt.

``rewards (B,)`` is NaN where a completion could not be graded: such a row enters no statistic and has
advantage 0. Identical rewards within a group give exactly 0 (before whitening, for the REINFORCE++ forms).
Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import GROUPLESS, MASK, OLD_LOGP, REF_LOGP
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, masked_mean, masked_sum, segment_count, segment_mean, segment_std

__all__ = [
    "as_float",
    "group_mean",
    "group_norm",
    "informative_groups",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "returns",
    "rloo",
    "whiten",
]


@method("group_norm", arxiv="2402.03300")
def group_norm(
    rewards: Tensor,
    group: Tensor,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
    scale: Literal["group", "batch", "none"] = "group",
) -> Tensor:
    """GRPO: the reward standardised over the prompt's graded completions, arXiv:2402.03300. Returns (B,).

    Formula: ``(R - mean) / (std + eps)``

    scale: the standard deviation is taken over the prompt's completions ("group"), over all graded
    completions of the step ("batch"), or not divided by ("none"). The paper states neither ddof nor eps;
    these are verl's, TRL uses eps 1e-4. A group with one graded completion gets 0 (verl returns R / (1 +
    eps), which is a raw reward, not an advantage).
    """

    def normalise(values: Tensor, ids: Tensor) -> Tensor:
        centred = values - segment_mean(values, ids)
        if scale == "none":
            return centred
        return centred / (segment_std(values, ids if scale == "group" else torch.zeros_like(ids), ddof) + eps)

    return _estimate_graded(normalise, rewards, group)


@method("group_mean", arxiv="2503.20783")
def group_mean(rewards: Tensor, group: Tensor) -> Tensor:
    """Dr.GRPO: the reward centred over the prompt's graded completions, arXiv:2503.20783. Returns (B,).

    Formula: ``R - mean``

    There is no division by the standard deviation, which would give very easy and very hard prompts more
    weight. The other half of the method is the aggregate ``dr_grpo``. A group with one graded completion gets
    0.
    """
    return _estimate_graded(lambda values, ids: values - segment_mean(values, ids), rewards, group)


@method("rloo", arxiv="2402.14740")
def rloo(rewards: Tensor, group: Tensor) -> Tensor:
    """The reward minus the mean of the prompt's *other* graded completions, arXiv:2402.14740. Returns (B,).

    Formula: ``R - mean of the others = G / (G - 1) (R - mean)``

    Raises ValueError for a group of one completion, which has no others (verl returns R there). A group of
    which only one completion could be graded gets 0: a grader's failure is no reason to stop the run.
    """
    is_single = segment_count(group) < 2
    if bool(is_single.any()):
        raise ValueError(
            f"rloo: group {int(group[is_single][0])} has 1 completion, the baseline needs at least 2; raise "
            "rollout.n"
        )

    def leave_one_out(values: Tensor, ids: Tensor) -> Tensor:
        count = segment_count(ids).to(values.dtype)
        return (values - segment_mean(values, ids)) * count / (count - 1).clamp(min=1)

    return _estimate_graded(leave_one_out, rewards, group)


@method(
    "reinforce_pp",
    arxiv="2501.03262",
    needs={MASK},
    needs_if={"kl_coef": {OLD_LOGP, REF_LOGP}},
    traits={GROUPLESS},
)
def reinforce_pp(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    gamma: float = 1.0,
    kl_coef: float = 0.0,
    eps: float = 1e-8,
) -> Tensor:
    """REINFORCE++: token returns discounted by gamma, whitened over all valid tokens of the step,
    arXiv:2501.03262.

    Formula: ``whiten(sum_{s >= t} gamma^(s - t) x_s)``, ``x_s = R 1[s is the last] - kl_coef (ln pi_old - ln
    pi_ref)_s``

    Returns (B, T): ``(ret - mean) / sqrt(variance + eps)`` with ddof 1; a step of equal returns gets 0.
    kl_coef weights k1, which is unbiased in the reward. Masked-out tokens inside a completion get no reward
    and no discount; verl's release truncates the return at the first of them.
    """
    del group
    graded = ~rewards.isnan()
    valid = mask.bool() & graded[:, None]
    last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    token_rewards = apply_mask(as_float(rewards)[:, None].expand(mask.shape), last)
    if kl_coef:
        if old_logp is None or ref_logp is None:
            missing = "old_logp" if old_logp is None else "ref_logp"
            raise ValueError(
                f"reinforce_pp: kl_coef is {kl_coef} but {missing} was not computed; set kl_coef to 0 or "
                "supply it"
            )
        token_rewards = token_rewards - kl_coef * apply_mask(old_logp - ref_logp, valid)
    return whiten(returns(token_rewards, valid, gamma), valid, eps)


@method("reinforce_pp_baseline", arxiv="2501.03262", needs={MASK})
def reinforce_pp_baseline(rewards: Tensor, group: Tensor, *, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """REINFORCE++ with the group mean as baseline on every token, arXiv:2501.03262.

    Formula: ``whiten(R - mean)`` over the step's tokens

    Returns (B, T). eps as in ``reinforce_pp``. A group with one graded completion enters the whitening as 0.
    """
    valid = mask.bool() & ~rewards.isnan()[:, None]
    return whiten(group_mean(rewards, group)[:, None].expand(mask.shape), valid, eps)


def informative_groups(values: Tensor, group: Tensor) -> Tensor:
    """(B,) bool at every row: the graded values of its group differ. DAPO's dynamic sampling keeps these
    prompts, arXiv:2503.14476.

    ``values (B,)`` is the raw correctness, for which this means ``0 < correct < G``. Do not pass the reward
    after a length penalty: it differs even within groups whose answers are all wrong.
    """
    spread = _estimate_graded(lambda kept, ids: (kept - segment_mean(kept, ids)).abs(), values, group)
    return segment_mean(spread, group) > 0


def _estimate_graded(estimate: Callable[[Tensor, Tensor], Tensor], rewards: Tensor, group: Tensor) -> Tensor:
    """``estimate(rewards, group)`` over the graded rows, 0 at the others."""
    rewards = as_float(rewards)
    graded = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    advantages[graded] = estimate(rewards[graded], group[graded])
    return advantages


def as_float(rewards: Tensor) -> Tensor:
    """Rewards as floating-point numbers, detached."""
    return rewards.detach() if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())


def returns(rewards: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """(B, T) ``ret_t = rew_t + gamma * ret_next``, where next is the next valid token.

    Computed by doubling: log2(T) passes instead of a loop over T.
    """
    total = rewards
    discount = torch.ones_like(rewards).masked_fill(valid, gamma)
    shift = 1
    while shift < rewards.shape[1]:
        ahead = total[:, shift:]
        total = torch.cat([total[:, :-shift] + discount[:, :-shift] * ahead, total[:, -shift:]], dim=1)
        discount = torch.cat([discount[:, :-shift] * discount[:, shift:], discount[:, -shift:]], dim=1)
        shift *= 2
    return total


def whiten(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Mean 0 and variance 1 (ddof 1) over all masked-in tokens of the step, 0 elsewhere.

    Equal values give exactly 0.
    """
    values = apply_mask(values, mask).detach()
    if not bool(mask.any()):
        return values
    centred = values - values[mask].min()
    centred = centred - masked_mean(centred, mask)
    variance = masked_sum(centred.square(), mask) / (mask.sum() - 1).clamp(min=1)
    return apply_mask(centred / (variance + eps).sqrt(), mask)
