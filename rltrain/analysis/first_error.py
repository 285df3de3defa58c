"""How well scores detect errors: AUC, and finding the first wrong step compared with guessing. numpy only.

An implicit process reward model is trained without step labels; these numbers measure what it knows about
steps. Intervals resample problems, because the solutions of one problem and the steps of one solution are not
independent of each other. They are seeded 95 % percentile bootstraps, as in ``report/statistics.py``.
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
    "aucs_within_clusters",
    "clustered_auc",
    "commonest_place",
    "first_wrong",
    "lowest_pick_chance",
]


def first_wrong(right: Sequence[bool | int | None]) -> int | None:
    """Index of the first wrong step; None if no step is wrong.

    right: a verdict per step; a step without a verdict (None) does not count as wrong.
    """
    return next((index for index, verdict in enumerate(right) if verdict is not None and not verdict), None)


def lowest_pick_chance(values: Sequence[float], place: int) -> float:
    """The probability that picking the lowest of ``values`` picks ``place``: 1, 0, or a share if several are
    lowest.

    If all K values are equal it is 1 / K, as for guessing. Raises ValueError if a value is NaN or ``place``
    is out of range.
    """
    if not 0 <= place < len(values):
        raise ValueError(f"there is no place {place} among {len(values)} values")
    if any(math.isnan(value) for value in values):
        raise ValueError(f"a value among {list(values)} is NaN, so none of them is the lowest")
    low = min(values)
    return float(values[place] == low) / sum(value == low for value in values)


def commonest_place(examples: Sequence[tuple[int, int]], steps: int) -> int:
    """The most frequent place of the first wrong step in a solution of ``steps`` steps, the earliest on ties.

    examples: (number of steps, place of the first wrong step). Only examples with ``steps`` steps count; if
    there are none, all count, with their place scaled to ``steps`` steps.
    """
    if not examples:
        raise ValueError("no examples of a first wrong step; at least one is needed")
    places = [place for length, place in examples if length == steps]
    if not places:
        places = [
            min(steps - 1, round(place / max(length - 1, 1) * (steps - 1))) for length, place in examples
        ]
    counts = Counter(places)
    return min(counts, key=lambda place: (-counts[place], place))


def auc(scores: Sequence[float], positive: Sequence[bool | int]) -> float:
    """The probability that a positive's score is above a negative's; ties count one half.

    Raises ValueError unless there are positives and negatives.
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

    Draws without positives or without negatives are left out.
    """
    ranked = _Ranked(scores, positive, cluster)
    drawn = [ranked.auc(weights) for weights in _cluster_weights(ranked.clusters, seed, resamples)]
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
    """AUC of ``scores`` minus that of ``others`` on the same examples, with an interval from the same
    draws.
    """
    ranked = _Ranked(scores, positive, cluster)
    other_ranked = _Ranked(others, positive, cluster)
    drawn = [
        ranked.auc(weights) - other_ranked.auc(weights)
        for weights in _cluster_weights(ranked.clusters, seed, resamples)
    ]
    return Estimate(auc(scores, positive) - auc(others, positive), *_interval(drawn), ranked.clusters)


def aucs_within_clusters(
    scores: Sequence[float], positive: Sequence[bool | int], cluster: Sequence[int]
) -> list[float]:
    """``auc`` inside each cluster that has positives and negatives. It does not profit from clusters that
    differ in their share of positives.
    """
    members: Mapping[int, list[int]] = defaultdict(list)
    for indices, name in enumerate(cluster):
        members[name].append(indices)

    aucs = []
    for indices in members.values():
        labels = [positive[index] for index in indices]
        if len(set(map(bool, labels))) == 2:
            aucs.append(auc([scores[index] for index in indices], labels))
    return aucs


class _Ranked:
    """Scores sorted once, for the AUC under many weightings of the clusters."""

    def __init__(
        self, scores: Sequence[float], positive: Sequence[bool | int], cluster: Sequence[int]
    ) -> None:
        values = np.asarray(scores, dtype=np.float64)
        is_positive = np.asarray(positive, dtype=bool)
        if not len(values) == len(is_positive) == len(cluster):
            raise ValueError(
                f"{len(values)} scores, {len(is_positive)} labels and {len(cluster)} clusters; their numbers "
                "must be equal"
            )
        if np.isnan(values).any():
            raise ValueError(
                f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; leave those examples out "
                "and say how many"
            )
        if is_positive.all() or not is_positive.any():
            raise ValueError(
                f"{int(is_positive.sum())} of {len(is_positive)} examples are positive; an AUC compares "
                "positives with negatives"
            )

        order = np.argsort(values, kind="stable")
        names, index = np.unique(np.asarray(cluster), return_inverse=True)
        self.clusters = len(names)
        self._cluster = index[order]
        self._is_positive = is_positive[order]
        self._starts = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])  # of runs of equal scores

    def auc(self, weights: NDArray[np.float64]) -> float:
        """weights: (C,) of the clusters. NaN if the positives or the negatives have no weight."""
        weight = weights[self._cluster]
        positives = np.add.reduceat(weight * self._is_positive, self._starts)
        negatives = np.add.reduceat(weight * ~self._is_positive, self._starts)
        total = positives.sum() * negatives.sum()
        if total <= 0:
            return math.nan
        return float((positives * (negatives.cumsum() - negatives / 2)).sum() / total)


def _cluster_weights(clusters: int, seed: int, resamples: int) -> list[NDArray[np.float64]]:
    """How often each cluster is drawn in each resample; empty for fewer than two clusters."""
    generator = np.random.default_rng(seed)
    count = 0 if clusters < 2 else resamples
    return [
        np.bincount(generator.integers(clusters, size=clusters), minlength=clusters).astype(np.float64)
        for _ in range(count)
    ]


def _interval(drawn: Sequence[float]) -> tuple[float, float]:
    values = [value for value in drawn if not math.isnan(value)]
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
