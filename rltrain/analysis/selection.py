"""The accuracy of choosing one of n samples: its expectation over all choices of n among the m given samples.
numpy only.

The samples of a prompt are exchangeable, so the mean over subsets is the unbiased estimate that uses every
sample. It has a closed form for best of n by a score (``best_of_n.expected_best``); votes are counted over
all subsets, or over a seeded sample of the subsets if there are many.
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
    # equal answers are equal objects; None: no answer was extracted, so there is no vote
    answers: tuple[Hashable | None, ...] = ()
    scores: tuple[float, ...] = ()  # by a reward model


@dataclass(frozen=True)
class Selection:
    """Accuracy of one way to choose among n."""

    selector: str
    n: int
    accuracy: Estimate

    def metrics(self) -> dict[str, float]:
        name = f"eval/{self.selector}@{self.n}"
        values = {
            name: self.accuracy.value,
            f"{name}_low": self.accuracy.low,
            f"{name}_high": self.accuracy.high,
        }
        return values | {f"eval/kl_spent@{self.n}": kl_bound(self.n)}


SELECTORS: dict[str, Callable[[Samples, int], float]] = {
    "implicit_prm": lambda samples, n: expected_best(samples.correct, n, samples.scores),
    "rm": lambda samples, n: expected_best(samples.correct, n, samples.scores),
    "oracle": lambda samples, n: expected_best(samples.correct, n),
    "majority": lambda samples, n: expected_vote(
        samples.correct, samples.answers, [1.0] * len(samples.correct), n
    ),
    "weighted_majority": lambda samples, n: expected_vote(
        samples.correct, samples.answers, _sigmoid(samples.scores), n
    ),
}


def selections(prompts: Sequence[Samples], selector: str, sizes: Sequence[int]) -> list[Selection]:
    """Accuracy at every n of ``sizes``, with intervals over prompts.

    Raises ValueError if a prompt has fewer samples than n.
    """
    return [Selection(selector, n, select_answers(prompts, selector, n)) for n in sizes]


def select_answers(prompts: Sequence[Samples], selector: str, n: int) -> Estimate:
    return average(
        [SELECTORS[selector](samples, n) for samples in prompts],
        seed=stable_hash("bootstrap", len(prompts), n),
    )


def expected_vote(
    correct: Sequence[float], answers: Sequence[Hashable | None], weights: Sequence[float], n: int
) -> float:
    """Accuracy of the answer with the largest summed weight among n of the m samples, mean over all choices
    of n.

    Tied answers share: in a random order of the samples each is equally likely to come first, and the first
    wins by the usual rule. The correctness of an answer is the mean over the chosen samples that give it;
    without any answer it is 0.
    """
    m = len(correct)
    if not 1 <= n <= m:
        raise ValueError(f"a vote of {n} cannot be estimated from {m} samples; n lies between 1 and {m}")
    distinct = dict.fromkeys(answer for answer in answers if answer is not None)
    numbers = {answer: number for number, answer in enumerate(distinct)}
    if not numbers:
        return 0.0

    no_answer = len(numbers)
    kinds = len(numbers) + 1
    answer_number = np.array([no_answer if answer is None else numbers[answer] for answer in answers])
    chosen = _subsets(m, n)
    place = np.arange(len(chosen))[:, None] * kinds + answer_number[chosen]
    size = len(chosen) * kinds

    def sum_by_answer(values: Sequence[float]) -> NDArray[np.float64]:
        """(subsets, answers)"""
        chosen_values = np.asarray(values, dtype=np.float64)[chosen].ravel()
        # the sums are floats already; the cast is for numpy's type hints, which declare integers
        sums = np.bincount(place.ravel(), chosen_values, minlength=size).astype(np.float64)
        return sums.reshape(len(chosen), kinds)[:, :no_answer]

    count = sum_by_answer([1.0] * m)
    right = sum_by_answer(correct)
    weight = np.where(count > 0, sum_by_answer(weights), -1.0)
    top = weight.max(axis=1, keepdims=True)
    winners = (weight >= top - 1e-12 * np.abs(top)) & (count > 0)
    share = np.divide(right, count, out=np.zeros_like(right), where=count > 0)
    return float(((share * winners).sum(axis=1) / np.maximum(winners.sum(axis=1), 1)).mean())


def _subsets(m: int, n: int) -> NDArray[np.int64]:
    """(S, n) positions: all choices of n among m, or if there are many a sample drawn with a fixed seed."""
    if math.comb(m, n) <= _MOST_SUBSETS:
        return np.array(list(itertools.combinations(range(m), n)), dtype=np.int64)
    generator = np.random.default_rng(stable_hash("subsets", m, n))
    return generator.permuted(np.tile(np.arange(m, dtype=np.int64), (_MOST_SUBSETS, 1)), axis=1)[:, :n]


def _sigmoid(scores: Sequence[float]) -> list[float]:
    return [0.5 * (1 + math.tanh(score / 2)) for score in scores]
