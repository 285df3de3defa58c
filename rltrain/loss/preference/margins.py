"""Margins from scores, and targets from margins.

gamma carries the units of the scores: nothing is rescaled unless the caller requests it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["gamma_for_target", "margins", "mean_target", "target_probability"]


def margins(
    score_chosen: Tensor,
    score_rejected: Tensor,
    *,
    divide_by: Literal["nothing", "std", "max_abs"] = "nothing",
) -> Tensor:
    """(N,) score differences over a whole data set; negative if the scores disagree with the order of the
    pair.

    divide_by: "nothing" (the MMPO authors' code), or the standard deviation (ddof 1) or the largest absolute
    value of the data set's margins, so that a gamma means the same for two scales of scores. Raises
    ValueError if a margin is not finite.
    """
    difference = score_chosen - score_rejected
    invalid = ~difference.isfinite()
    if bool(invalid.any()):
        raise ValueError(
            f"{int(invalid.sum())} of {difference.shape[0]} pairs have no finite margin (first: row "
            f"{int(invalid.nonzero()[0])})"
        )
    if divide_by == "nothing":
        return difference
    scale = difference.std() if divide_by == "std" else difference.abs().max()
    if not scale > 0:
        raise ValueError(
            f"all {difference.shape[0]} margins are equal, so divide_by {divide_by!r} would divide by 0"
        )
    return difference / scale


def target_probability(margin: Tensor, gamma: float) -> Tensor:
    """(N,) ``sigmoid(gamma margin)``: Bradley-Terry probability that chosen is better, arXiv:2410.03145."""
    return torch.sigmoid(gamma * margin)


def mean_target(margin: Tensor, gamma: float) -> float:
    """Mean over a data set of ``sigmoid(gamma |margin|)``."""
    return float(target_probability(margin.abs(), gamma).mean())


def gamma_for_target(margin: Tensor, target: float = 0.85) -> float:
    """The gamma for which the mean of ``sigmoid(gamma |margin|)`` over a data set is ``target``.

    This rule is ours; the paper's gammas belong to its data sets (2.2 on UltraFeedback). target lies in (0.5,
    1 - share of ties / 2).
    """
    ties = float((margin == 0).to(torch.float64).mean())
    if not 0.5 < target < 1 - ties / 2:
        raise ValueError(
            f"a mean target of {target} cannot be reached: with {ties:.0%} ties it lies in (0.5, "
            f"{1 - ties / 2:.3g})"
        )
    return _bisect(lambda gamma: mean_target(margin, gamma) - target)


def _bisect(rising: Callable[[float], float]) -> float:
    """The positive root of a rising function, to relative precision 1e-12."""
    high = 1.0
    while rising(high) < 0:
        high *= 2
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
        if math.isclose(low, high, rel_tol=1e-12):
            break
    return high
