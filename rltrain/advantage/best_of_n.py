"""Selects samples by their reward, for supervised steps on the best of them."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.advantage.group import as_float
from rltrain.registry import method

__all__ = ["best_of_n", "keep_best"]


@method("best_of_n", arxiv="2310.16763")
def best_of_n(rewards: Tensor, group: Tensor, *, top_k: int = 1) -> Tensor:
    """SuperHF's filter: the best completions of each prompt count, the others do not, arXiv:2310.16763.
    Returns (B,).

    Formula: ``1[R is among the top_k of the prompt]``

    The loss ``reinforce`` imitates the kept completions; the control ``positive_only`` removes the others
    from every denominator and from the gradient pass, so that one update is the paper's: the mean negative
    log-likelihood of the kept tokens. Earlier rows win ties, even if all completions of a prompt are equally
    bad: dynamic sampling replaces such prompts. NaN rewards get 0. The paper's length penalty is the reward
    ``characters``.
    """
    if top_k < 1:
        raise ValueError(f"best_of_n: top_k is {top_k}; keep at least 1 completion of each prompt")
    rewards = as_float(rewards)
    return keep_best(rewards, group, top_k=top_k).to(rewards.dtype)


def keep_best(reward: Tensor, group: Tensor, *, top_k: int = 1) -> Tensor:
    """(B,) bool: the row is among the ``top_k`` completions of its prompt; earlier rows win ties.

    NaN rewards are never kept.
    """
    order = torch.argsort(torch.where(reward.isnan(), -torch.inf, reward), descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = group[order][1:] != group[order][:-1]
    position = torch.arange(len(order), device=order.device)
    start = torch.where(is_first, position, 0).cummax(0).values
    kept = torch.zeros_like(is_first)
    kept[order] = position - start < top_k
    return kept & ~reward.isnan()
