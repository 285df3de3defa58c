"""What choosing one of n samples is worth: expected accuracy over all choices of n among the m samples at
hand. numpy only.

The samples of a prompt are exchangeable, so the mean over subsets is the unbiased estimate that uses every
sample. Best of n by a score has it in closed form (``best_of_n.expected_best``); for votes all subsets are
counted, or a seeded sample of them where they are many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rltrain.analysis.best_of_n import expected_best, kl_bound
from rltrain.report.statistics import Estimate, average
from rltrain.seeds import stable_hash

__all__ = ["SELECTORS", "Samples", "Selection", "expected_vote", "select_answers", "selections"]

_MOST_SUBSETS = 20_000  # 16 samples have 12,870 subsets of 8


@dataclass(frozen=True)
class Samples:
    """The m completions of one prompt."""

    correct: tuple[float, ...]  # 1 right, 0 wrong or ungraded
    answers: tuple[
        Hashable | None, ...
    ] = ()  # equal for equal answers; None where none was found: it has no vote
    scores: tuple[float, ...] = ()  # a reward model's


@dataclass(frozen=True)
class Selection:
    """Accuracy of one way to choose among n."""

    selector: str
    n: int
    accuracy: Estimate

    def metrics(self) -> dict[str, float]:
        name = f"eval/{self.selector}@{self.n}"
        found = {
            name: self.accuracy.value,
            f"{name}_low": self.accuracy.low,
            f"{name}_high": self.accuracy.high,
        }
        return found | {f"eval/kl_spent@{self.n}": kl_bound(self.n)}


SELECTORS: dict[str, Callable[[Samples, int], float]] = {
    "implicit_prm": lambda one, n: expected_best(one.correct, n, one.scores),
    "rm": lambda one, n: expected_best(one.correct, n, one.scores),
    "oracle": lambda one, n: expected_best(one.correct, n),
    "majority": lambda one, n: expected_vote(one.correct, one.answers, [1.0] * len(one.correct), n),
    "weighted_majority": lambda one, n: expected_vote(one.correct, one.answers, _sigmoid(one.scores), n),
}


def selections(prompts: Sequence[Samples], selector: str, sizes: Sequence[int]) -> list[Selection]:
    """Accuracy at every n of ``sizes``, with intervals over prompts.

    Raises ValueError where a prompt has fewer samples than n.
    """
    return [Selection(selector, n, select_answers(prompts, selector, n)) for n in sizes]


def select_answers(prompts: Sequence[Samples], selector: str, n: int) -> Estimate:
    return average(
        [SELECTORS[selector](one, n) for one in prompts], seed=stable_hash("bootstrap", len(prompts), n)
    )


def expected_vote(
    correct: Sequence[float], answers: Sequence[Hashable | None], weights: Sequence[float], n: int
) -> float:
    """Accuracy of the answer with the largest summed weight among n of the m samples, mean over all choices
    of n.

    Tied answers share: in a random order of the samples each is as likely to come first, which is the usual
    rule for ties. An answer is as right as the chosen samples that give it are on average; without any answer
    the vote is lost.
    """
    m = len(correct)
    if not 1 <= n <= m:
        raise ValueError(f"a vote of {n} cannot be estimated from {m} samples; n lies between 1 and {m}")
    numbers = {
        answer: number
        for number, answer in enumerate(dict.fromkeys(one for one in answers if one is not None))
    }
    if not numbers:
        return 0.0
    kinds, silent = len(numbers) + 1, len(numbers)
    kind = np.array([silent if answer is None else numbers[answer] for answer in answers])
    chosen = _subsets(m, n)
    place = np.arange(len(chosen))[:, None] * kinds + kind[chosen]
    size = len(chosen) * kinds

    def summed(values: Sequence[float]) -> NDArray[np.float64]:
        """(subsets, answers)"""
        given = np.asarray(values, dtype=np.float64)[chosen].ravel()
        sums = np.bincount(place.ravel(), given, minlength=size).astype(
            np.float64
        )  # floats already: numpy's types say whole numbers
        return sums.reshape(len(chosen), kinds)[:, :silent]

    weight, count, right = summed(weights), summed([1.0] * m), summed(correct)
    weight = np.where(count > 0, weight, -1.0)
    top = weight.max(axis=1, keepdims=True)
    winners = (weight >= top - 1e-12 * np.abs(top)) & (count > 0)
    share = np.divide(right, count, out=np.zeros_like(right), where=count > 0)
    return float(((share * winners).sum(axis=1) / np.maximum(winners.sum(axis=1), 1)).mean())


def _subsets(m: int, n: int) -> NDArray[np.int64]:
    """(S, n) positions: all choices of n among m, or as many as are taken, drawn with a fixed seed."""
    if math.comb(m, n) <= _MOST_SUBSETS:
        return np.array(list(itertools.combinations(range(m), n)), dtype=np.int64)
    generator = np.random.default_rng(stable_hash("subsets", m, n))
    return generator.permuted(np.tile(np.arange(m, dtype=np.int64), (_MOST_SUBSETS, 1)), axis=1)[:, :n]


def _sigmoid(scores: Sequence[float]) -> list[float]:
    return [0.5 * (1 + math.tanh(score / 2)) for score in scores]
