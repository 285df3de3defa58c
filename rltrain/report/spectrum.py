"""The spectrum of hidden states: how many directions a model uses. Reinforcement learning was seen to
compress it, supervised and preference training to expand it, arXiv:2509.23024.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alpha_req", "rank_me", "spectrum_metrics"]

_EPS = 1e-7  # added to each share of the spectrum, as RankMe has it


def rank_me(states: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values of ``states (N, H)``, as shares of their
    sum, arXiv:2210.02885. From 1, all states along one line, to min(N, H). NaN without any state but 0.
    """
    values = torch.linalg.svdvals(states.double())
    shares = values / values.sum() + _EPS
    return float(torch.exp(-(shares * shares.log()).sum()))


def alpha_req(states: Tensor) -> float:
    """alpha-ReQ: the exponent with which the eigenvalues of the covariance of ``states (N, H)`` fall,
    ``lambda_i ~ i^-alpha`` (Agrawal et al. 2022). Small: many directions matter.

    A least-squares line through the logarithms from the 11th eigenvalue (the quarter, where there are fewer
    than 44) to the half of the min(N - 1, H) that there can be; the range is ours. NaN where fewer than two
    of these exceed 1e-12 of the largest.
    """
    centred = states.double() - states.double().mean(dim=0)
    values = torch.linalg.svdvals(centred).square()[: min(len(states) - 1, states.shape[1])]
    index = torch.arange(min(10, len(values) // 4), len(values) // 2)
    index = index[values[index] > 1e-12 * values.max()] if len(values) else index
    if len(index) < 2:
        return float("nan")
    x = (index + 1).double().log()
    y = values[index].log()
    x = x - x.mean()
    return float(-(x * (y - y.mean())).sum() / x.square().sum())


def spectrum_metrics(states: Tensor) -> dict[str, float]:
    """Both numbers of ``states (N, H)``, under their names in an evaluation."""
    return {"eval/rank_me": rank_me(states), "eval/alpha_req": alpha_req(states)}
