"""Samples kept or left by their reward, for supervised steps on the best of them."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.advantage.group import as_float
from rltrain.registry import method

__all__ = ["best_of_n", "keep_best"]


@method("best_of_n", arxiv="2310.16763")
def best_of_n(rewards: Tensor, group: Tensor, *, top_k: int = 1) -> Tensor:
    """SuperHF's filter: 1 for the ``top_k`` completions of each prompt, 0 for the others, arXiv:2310.16763.
    Returns (B,).

    With loss ``reinforce`` the kept ones are imitated; the control ``positive_only`` takes the others out of
    every denominator and of the gradient pass, so that one update is the paper's: the mean negative
    log-likelihood of the kept tokens. Earlier rows win ties, also where all of a prompt's completions are
    equally bad: dynamic sampling replaces such prompts. NaN rewards get 0. The paper's length penalty is a
    matter of the reward.
    """
    if top_k < 1:
        raise ValueError(f"best_of_n: top_k is {top_k}; keep at least 1 completion of a prompt")
    rewards = as_float(rewards)
    return keep_best(rewards, group, top_k=top_k).to(rewards.dtype)


def keep_best(reward: Tensor, group: Tensor, *, top_k: int = 1) -> Tensor:
    """(B,) bool: among the ``top_k`` completions of their prompt, earlier rows first on ties.

    NaN rewards are never kept.
    """
    order = torch.argsort(torch.where(reward.isnan(), -torch.inf, reward), descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = group[order][1:] != group[order][:-1]
    position = torch.arange(len(order), device=order.device)
    start = torch.where(new, position, 0).cummax(0).values
    kept = torch.zeros_like(new)
    kept[order] = position - start < top_k
    return kept & ~reward.isnan()
