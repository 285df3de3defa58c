"""Advantages that differ from GRPO's in the baseline, or in what they divide by: MaxRL, OPO, GPG, a risk
measure of the group, and the optimal value of A*-PO.

As in ``group.py``, an ungraded completion (NaN) enters no statistic and has advantage 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import as_float, group_mean, informative_groups
from rltrain.needs import EXTRA_SAMPLES, MASK, POLICY_LOSS, SOURCE, VERSION
from rltrain.registry import method
from rltrain.tensor_ops import segment_count, segment_mean
from rltrain.types.samples import SOURCE_POLICY, SOURCE_REFERENCE

__all__ = ["gpg", "max_rl", "opo", "optimal_value", "risk_averse"]


@method("max_rl", arxiv="2602.02710")
def max_rl(rewards: Tensor, group: Tensor) -> Tensor:
    """MaxRL: the centred reward divided by the mean over the prompt's graded completions, arXiv:2602.02710.
    Returns (B,).

    Formula: ``(R - mean) / mean``

    For rewards of 0 and 1 it is the gradient of the log of the success rate, which weighs hard prompts more.
    Rewards are at least 0. A group without a reward above 0 gets 0.
    """
    centred = group_mean(rewards, group)
    mean = as_float(rewards) - centred
    return torch.where(mean > 0, centred / mean, 0.0)


@method("opo", arxiv="2505.23585", needs={MASK})
def opo(rewards: Tensor, group: Tensor, *, mask: Tensor) -> Tensor:
    """OPO: the reward minus the prompt's mean weighted by lengths, arXiv:2505.23585. Returns (B,).

    Formula: ``R - sum_i |y_i| R_i / sum_i |y_i|``

    The weight stands in for the squared norm of a completion's gradient, for which this baseline has the
    least variance. The paper trains on policy, with ``reinforce`` and one update per rollout. A group with
    one graded completion gets 0 (verl returns R there).
    """
    values = as_float(rewards)
    graded = ~values.isnan()
    lengths = mask.sum(dim=1).to(values.dtype)
    weights = torch.where(graded, lengths, 0.0)
    weighted = torch.where(graded, values * lengths, 0.0)
    baseline = segment_mean(weighted, group) / segment_mean(weights, group)
    return torch.where(graded & (segment_mean(weights, group) > 0), values - baseline, 0.0)


@method("gpg", arxiv="2504.02546")
def gpg(
    rewards: Tensor, group: Tensor, *, scale: Literal["informative", "nonzero", "none"] = "informative"
) -> Tensor:
    """GPG: the centred reward, scaled up where the step has prompts without a signal, arXiv:2504.02546.
    Returns (B,).

    Formula: ``alpha (R - mean)``, ``alpha = completions / completions in groups whose rewards differ``

    scale: alpha is the number of completions divided by that of those in groups whose rewards differ, so that
    prompts without a signal do not shrink the gradient ("informative", the paper), by that of rewards other
    than 0 ("nonzero", verl), or 1. The loss is ``reinforce``, with one update per rollout.
    """
    centred = group_mean(rewards, group)
    if scale == "none":
        return centred
    graded = ~rewards.isnan()
    counted = informative_groups(rewards, group) if scale == "informative" else rewards != 0
    return centred * (graded.sum() / (counted & graded).sum().clamp(min=1)).to(centred.dtype)


@method("risk_averse", arxiv="2205.05138", needs={VERSION})
def risk_averse(
    rewards: Tensor, group: Tensor, *, version: Tensor, share: float = 0.5, anneal_updates: int = 0
) -> Tensor:
    """CVaR of a prompt's completions: only the worst share of the group teaches, arXiv:2205.05138. Returns
    (B,).

    Formula: ``1[R is in the worst share] (R - q) / share``

    q is the group's reward at that share, so that the gradient is that of the mean over the worst
    completions: a policy that is rarely very wrong. share: of the group, above 0 and at most 1.
    anneal_updates: the share falls from 1 to its value over so many updates of the policy that sampled (the
    paper's soft risk: blind to successes from the start, it would find none); 0: at once. A group of equal
    rewards gets 0.
    """
    if not 0 < share <= 1:
        raise ValueError(f"risk_averse: share is {share}; expected above 0 and at most 1")
    values = as_float(rewards)
    graded = ~values.isnan()
    counts = segment_count(torch.where(graded, group, -1))
    newest = version.amax(dim=1)
    progress = (newest / anneal_updates).clamp(0, 1) if anneal_updates else torch.ones_like(newest)
    current = 1 - (1 - share) * progress.to(values.dtype)
    worst = (current * counts).ceil().clamp(min=1)  # completions that count
    rank = _ranks_in_groups(values, group)
    is_last = graded & (rank == worst - 1)  # the best of the worst, whose reward is q
    highest = segment_mean(torch.where(is_last, values, 0.0), group) * segment_count(group)
    return torch.where(graded & (rank < worst), (values - highest) / current, 0.0)


def _ranks_in_groups(values: Tensor, group: Tensor) -> Tensor:
    """(B,) number of rows of the same group before each row in ascending order of value; NaN comes last."""
    order = values.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sorted_group = group[order]
    is_first = torch.ones_like(sorted_group, dtype=torch.bool)
    is_first[1:] = sorted_group[1:] != sorted_group[:-1]
    place = torch.arange(len(order), device=values.device)
    ranks = torch.empty_like(place)
    ranks[order] = place - torch.where(is_first, place, 0).cummax(dim=0).values
    return ranks


@method(
    "optimal_value",
    arxiv="2505.20686",
    needs={SOURCE},
    traits={EXTRA_SAMPLES("reference"), POLICY_LOSS("a_star_po")},
)
def optimal_value(rewards: Tensor, group: Tensor, *, source: Tensor, beta: float = 0.5) -> Tensor:
    """A*-PO: the reward minus the optimal value, from the reference model's completions of the prompt,
    arXiv:2505.20686. Returns (B,); 0 for rows of other sources.

    Formula: ``R - V*``, ``V* = beta ln mean exp(R_ref / beta)``

    V* is the value of the policy that a KL weight of beta makes optimal (beta_1 of the paper). The paper
    samples the reference once, before training; here it is sampled in each step, which costs time and saves
    the file. A prompt without a graded reference completion gets 0.
    """
    values = as_float(rewards)
    is_reference = (source == SOURCE_REFERENCE) & ~values.isnan()
    top = torch.where(is_reference, values, -torch.inf).max()
    powers = torch.where(is_reference, ((values - top) / beta).exp(), 0.0)
    share = segment_mean(is_reference.to(values.dtype), group)
    optimum = top + beta * (segment_mean(powers, group) / share).log()
    is_known = (source == SOURCE_POLICY) & ~values.isnan() & (share > 0)
    return torch.where(is_known, values - optimum, 0.0)
