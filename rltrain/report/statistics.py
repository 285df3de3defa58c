"""Statistics of an evaluation: unbiased pass@k, averages, and intervals over prompts. numpy only.

Prompts are resampled, because the completions of one prompt are not independent of each other. Intervals are
seeded 95 % percentile bootstraps; they are NaN for fewer than two prompts, which have no spread. When every
prompt has the same score the interval has no width: that is a property of the sample, not certainty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 20  # resampled values in memory at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts with its interval."""

    value: float
    low: float
    high: float
    prompts: int


@dataclass(frozen=True, slots=True)
class PassAtK:
    """The probability that at least one of ``k`` completions is right, mean over prompts, estimated
    from ``n`` completions of each.
    """

    k: int
    n: int
    value: float
    low: float
    high: float
    prompts: int


def unbiased_pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k), the unbiased estimator of one prompt's pass@k (Chen et al. 2021,
    arXiv:2107.03374).

    It is the share of all sets of k among the n completions that contain a right one. Raises ValueError
    unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} completions cannot be correct")
    if not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} needs at least {k} completions per prompt and k >= 1, got n = {n}; raise eval.n or "
            f"drop {k} from eval.k"
        )
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def pass_at_k(correct: Sequence[int], n: int, k: int, *, seed: int) -> PassAtK:
    """pass@k over prompts; ``correct`` holds how many of each prompt's ``n`` completions are right.

    Raises ValueError on no prompts.
    """
    per_prompt = [unbiased_pass_at_k(n, count, k) for count in correct]
    mean = average(per_prompt, seed=seed)
    return PassAtK(k=k, n=n, value=mean.value, low=mean.low, high=mean.high, prompts=mean.prompts)


def average_at_k(scores: Sequence[Sequence[float]], *, seed: int) -> Estimate:
    """avg@k: each prompt's mean score over its k completions, then the mean over prompts.

    Raises ValueError on a prompt without scores.
    """
    empty = sum(1 for values in scores if len(values) == 0)
    if empty:
        raise ValueError(
            f"{empty} of {len(scores)} prompts have no scored completion; leave them out and say how many"
        )
    return average([sum(values) / len(values) for values in scores], seed=seed)


def average(per_prompt: Sequence[float], *, seed: int) -> Estimate:
    """Mean over prompts with its bootstrap interval. Raises ValueError on no prompts."""
    if len(per_prompt) == 0:
        raise ValueError("no prompts were evaluated; expected at least one")
    low, high = bootstrap_interval(per_prompt, seed=seed)
    return Estimate(float(np.mean(per_prompt)), low, high, len(per_prompt))


def paired_difference(before: Mapping[str, float], after: Mapping[str, float], *, seed: int) -> Estimate:
    """Mean of ``after - before`` over prompts, by prompt id, with the interval of the differences.

    Pairing removes the spread between easy and hard prompts, which is most of the spread. Raises ValueError
    unless both runs evaluated the same prompts.
    """
    if before.keys() != after.keys():
        only_before = len(before.keys() - after.keys())
        only_after = len(after.keys() - before.keys())
        raise ValueError(
            f"the runs evaluated different prompts: {only_before} only the first, {only_after} only the "
            "second; evaluate both on the same held-out set"
        )
    return average([after[prompt] - before[prompt] for prompt in before], seed=seed)


def bootstrap_interval(
    per_prompt: Sequence[float], *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over prompts drawn with replacement; (NaN, NaN) for fewer than
    two prompts.
    """
    values = np.asarray(per_prompt, dtype=np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    means = [
        values[generator.integers(len(values), size=(min(rows, resamples - done), len(values)))].mean(axis=1)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clustered_average(
    values: Sequence[float],
    cluster: Sequence[int],
    *,
    seed: int,
    counts: Sequence[float] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Estimate:
    """Mean over values in clusters (the examples of one prompt), with an interval over clusters drawn with
    replacement.

    counts: if each value is a sum (over a completion's tokens), the number of its summands, so that the mean
    is over the summands; None: one each. A draw's mean is its sum divided by its count, so that large
    clusters have the same weight as in the mean itself. Raises ValueError on no values.
    """
    if len(values) == 0:
        raise ValueError("no examples were evaluated; expected at least one")
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    count = np.bincount(
        index, weights=np.ones(len(index)) if counts is None else np.asarray(counts, dtype=np.float64)
    )
    total = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    mean = float(total.sum() / count.sum())
    if len(count) < 2:
        return Estimate(mean, math.nan, math.nan, len(count))
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(count))
    means: list[np.ndarray] = []
    for done in range(0, resamples, rows):
        drawn = generator.integers(len(count), size=(min(rows, resamples - done), len(count)))
        means.append(total[drawn].sum(axis=1) / count[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), len(count))


def calibration_error(probability: Sequence[float], degree: Sequence[float], *, bins: int = 10) -> float:
    """Expected calibration error of predicted preferences: 0 if pairs with predicted probability p have
    degree p (arXiv:1706.04599).

    probability, degree: predicted and true probability that the first completion of each pair is the better
    one. A pair is equivalent to its mirror image (1 - p, 1 - d), so pairs with p below one half are mirrored;
    at one half the degree is one half. The absolute differences between mean p and mean d in equally wide
    bins of [0.5, 1] are averaged, weighted by their number of pairs. Raises ValueError on no pairs.
    """
    if len(probability) == 0:
        raise ValueError("no pairs were evaluated; expected at least one")
    p = np.asarray(probability, dtype=np.float64)
    d = np.asarray(degree, dtype=np.float64)
    d = np.where(p < 0.5, 1 - d, np.where(p == 0.5, 0.5, d))
    p = np.maximum(p, 1 - p)
    index = np.minimum((2 * bins * (p - 0.5)).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(index, weights=p - d)).sum() / len(p))
