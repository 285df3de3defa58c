"""How well scores find what is wrong: AUC, and the first wrong step against guessing. numpy only.

A process reward model never saw a label of a step; these numbers say what it knows of them nevertheless. The
problem is what is resampled for intervals: solutions of one problem, and steps of one solution, are not
independent of each other. Intervals are seeded 95 % percentile bootstraps, as in ``statistics.py``.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rltrain.report.statistics import Estimate

__all__ = [
    "auc",
    "auc_difference",
    "clustered_auc",
    "commonest_place",
    "first_wrong",
    "lowest_at",
    "within_auc",
]


def first_wrong(right: Sequence[bool | int | None]) -> int | None:
    """Index of the first step called wrong; None where no step is.

    A step that nobody judged (None) is not wrong.
    """
    return next((at for at, one in enumerate(right) if one is not None and not one), None)


def lowest_at(values: Sequence[float], place: int) -> float:
    """The chance that a pick of the lowest of ``values`` picks ``place``: 1, 0, or a share where several are
    lowest.

    Values that are all equal are guessing: 1 / K. Raises ValueError where a value is NaN or ``place`` is none
    of theirs.
    """
    if not 0 <= place < len(values):
        raise ValueError(f"there is no place {place} among {len(values)} values")
    if any(math.isnan(value) for value in values):
        raise ValueError(f"a value among {list(values)} is NaN, so none of them is the lowest")
    low = min(values)
    return float(values[place] == low) / sum(value == low for value in values)


def commonest_place(examples: Sequence[tuple[int, int]], steps: int) -> int:
    """Where, among ``steps`` steps, the first wrong one mostly is in ``examples`` of (number of steps, first
    wrong one).

    Examples of as many steps decide; where there are none, all of them do by the place's share of the length.
    The earliest on ties.
    """
    if not examples:
        raise ValueError("no examples of a first wrong step; at least one is needed")
    alike = [place for length, place in examples if length == steps]
    if not alike:
        alike = [
            min(steps - 1, round(place / max(length - 1, 1) * (steps - 1))) for length, place in examples
        ]
    counts = Counter(alike)
    return min(counts, key=lambda place: (-counts[place], place))


def auc(scores: Sequence[float], positive: Sequence[bool | int]) -> float:
    """The chance that a positive's score is above a negative's, ties half.

    Raises ValueError unless both kinds are there.
    """
    return _Ranked(scores, positive, range(len(scores))).auc(np.ones(len(scores)))


def clustered_auc(
    scores: Sequence[float],
    positive: Sequence[bool | int],
    cluster: Sequence[int],
    *,
    seed: int,
    resamples: int = 2000,
) -> Estimate:
    """``auc`` with an interval over clusters drawn with replacement.

    Draws without one of the two kinds are left out.
    """
    ranked = _Ranked(scores, positive, cluster)
    drawn = [ranked.auc(weights) for weights in _draws(ranked.clusters, seed, resamples)]
    return Estimate(auc(scores, positive), *_interval(drawn), ranked.clusters)


def auc_difference(
    scores: Sequence[float],
    others: Sequence[float],
    positive: Sequence[bool | int],
    cluster: Sequence[int],
    *,
    seed: int,
    resamples: int = 2000,
) -> Estimate:
    """AUC of ``scores`` less that of ``others`` on the same examples, with the interval of the
    difference in the same draws.
    """
    one, other = _Ranked(scores, positive, cluster), _Ranked(others, positive, cluster)
    drawn = [one.auc(weights) - other.auc(weights) for weights in _draws(one.clusters, seed, resamples)]
    return Estimate(auc(scores, positive) - auc(others, positive), *_interval(drawn), one.clusters)


def within_auc(
    scores: Sequence[float], positive: Sequence[bool | int], cluster: Sequence[int]
) -> list[float]:
    """``auc`` inside each cluster that has both kinds: what is left when clusters differ in how often
    they are positive.
    """
    members: Mapping[int, list[int]] = defaultdict(list)
    for at, name in enumerate(cluster):
        members[name].append(at)
    mixed = [at for at in members.values() if len({bool(positive[one]) for one in at}) == 2]
    return [auc([scores[one] for one in at], [positive[one] for one in at]) for at in mixed]


class _Ranked:
    """Scores sorted once, for the AUC under many weightings of their clusters."""

    def __init__(
        self, scores: Sequence[float], positive: Sequence[bool | int], cluster: Sequence[int]
    ) -> None:
        values, kind = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
        if not len(values) == len(kind) == len(cluster):
            raise ValueError(
                f"{len(values)} scores, {len(kind)} labels and {len(cluster)} clusters; there must be as "
                "many of each"
            )
        if np.isnan(values).any():
            raise ValueError(
                f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; leave those examples out "
                "and say how many"
            )
        if kind.all() or not kind.any():
            raise ValueError(
                f"{int(kind.sum())} of {len(kind)} examples are positive; an AUC compares positives with "
                "negatives"
            )
        order = np.argsort(values, kind="stable")
        names, index = np.unique(np.asarray(cluster), return_inverse=True)
        self.clusters, self._cluster, self._kind = len(names), index[order], kind[order]
        self._starts = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])  # of runs of equal scores

    def auc(self, weights: NDArray[np.float64]) -> float:
        """weights: of each cluster (C,). NaN where they leave one kind without weight."""
        weight = weights[self._cluster]
        above = np.add.reduceat(weight * self._kind, self._starts)
        below = np.add.reduceat(weight * ~self._kind, self._starts)
        total = above.sum() * below.sum()
        return float((above * (below.cumsum() - below / 2)).sum() / total) if total > 0 else math.nan


def _draws(clusters: int, seed: int, resamples: int) -> list[NDArray[np.float64]]:
    """How often each cluster comes up in each draw; none for fewer than two clusters."""
    generator = np.random.default_rng(seed)
    count = 0 if clusters < 2 else resamples
    return [
        np.bincount(generator.integers(clusters, size=clusters), minlength=clusters).astype(np.float64)
        for _ in range(count)
    ]


def _interval(drawn: Sequence[float]) -> tuple[float, float]:
    found = [value for value in drawn if not math.isnan(value)]
    if not found:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
