"""Choosing among n answers: which answer wins, and the KL that choosing costs. Numbers and numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

__all__ = [
    "best",
    "expected_best",
    "kl_bound",
    "majority",
    "n_for_kl",
    "vote_weights",
]

Answer = TypeVar("Answer", bound=Hashable)


def best(scores: Sequence[float]) -> int:
    """Index of the largest score, the first on ties.

    A NaN never wins; raises ValueError if every score is NaN.
    """
    scored = [index for index, score in enumerate(scores) if not math.isnan(score)]
    if not scored:
        raise ValueError(f"none of {len(scores)} answers has a score")
    return max(scored, key=lambda index: scores[index])


def vote_weights(answers: Sequence[Answer], scores: Sequence[float]) -> dict[Answer, float]:
    """Summed ``sigmoid(score)`` of each distinct answer, in order of first appearance, arXiv:2412.01981.

    Scores must have the reward model's training beta. At a thousandth of it every sigmoid is about 1/2, which
    is plain majority voting.
    """
    totals: dict[Answer, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        totals[answer] = totals.get(answer, 0.0) + 0.5 * (1 + math.tanh(score / 2))
    return totals


def majority(answers: Sequence[Answer]) -> Answer:
    """The most frequent answer, the first to appear on ties."""
    counts = vote_weights(answers, [0.0] * len(answers))
    return max(counts, key=lambda answer: counts[answer])


def kl_bound(n: int) -> float:
    """``log n - (n - 1) / n`` nats, the upper bound of KL(best of n, sampled); continuous scores reach it
    (arXiv:2404.01730).
    """
    if n < 1:
        raise ValueError(f"best of {n}: n must be at least 1")
    return math.log(n) - (n - 1) / n


def n_for_kl(kl: float) -> float:
    """The (real) n whose ``kl_bound`` is ``kl`` nats: the best-of-n with which to compare a policy at that
    KL.
    """
    if kl < 0:
        raise ValueError(f"a KL divergence is not negative, got {kl}")
    return _root(lambda n: math.log(n) - (n - 1) / n - kl, low=1.0, high=2.0)


def expected_best(rewards: Sequence[float], n: int, scores: Sequence[float] | None = None) -> float:
    """Mean reward of the best-scored of n, over all choices of n among the m >= n samples: ``sum_i r_(i)
    C(i-1, n-1) / C(m, n)``.

    scores: the numbers to choose by (None: the rewards); samples of equal score share their places.
    """
    m = len(rewards)
    if not 1 <= n <= m:
        raise ValueError(f"best of {n} cannot be estimated from {m} samples; n lies between 1 and {m}")
    keys = rewards if scores is None else scores
    order = sorted(range(m), key=lambda index: keys[index])
    chance = [math.comb(place, n - 1) / math.comb(m, n) for place in range(m)]

    total = 0.0
    start = 0
    while start < m:
        stop = next((place for place in range(start, m) if keys[order[place]] != keys[order[start]]), m)
        total += (
            sum(chance[start:stop])
            * sum(rewards[order[place]] for place in range(start, stop))
            / (stop - start)
        )
        start = stop
    return total


def _root(rising: Callable[[float], float], *, low: float, high: float) -> float:
    """The root above ``low`` of a rising function. Raises ValueError if it exceeds 1e12."""
    while rising(high) < 0:
        low, high = high, 2 * high
        if high > 1e12:
            raise ValueError("no such value below 1e12: this KL cannot be reached")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
