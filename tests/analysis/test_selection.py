"""Choosing among n samples, against brute force over every order of the samples."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from rltrain.analysis.best_of_n import best, majority, vote_weights
from rltrain.analysis.selection import Samples, expected_vote, select_answers, selections


def brute(samples: Samples, selector: str, n: int) -> float:
    """Mean over all orders of the samples of what the first n of them give by the plain rules: first
    on ties.
    """
    total = []
    for order in itertools.permutations(range(len(samples.correct)), n):
        correct = [samples.correct[i] for i in order]
        answers = [samples.answers[i] for i in order]
        scores = [samples.scores[i] for i in order]
        if selector in ("implicit_prm", "rm"):
            total.append(correct[best(scores)])
        elif selector == "oracle":
            total.append(max(correct))
        else:
            votes = [(a, s, c) for a, s, c in zip(answers, scores, correct, strict=True) if a is not None]
            if not votes:
                total.append(0.0)
                continue
            names = [a for a, _, _ in votes]
            weights = vote_weights(names, [s for _, s, _ in votes])
            winner = (
                majority(names) if selector == "majority" else max(weights, key=lambda name: weights[name])
            )
            right = [c for a, _, c in votes if a == winner]
            total.append(sum(right) / len(right))
    return sum(total) / len(total)


@pytest.mark.parametrize("selector", ["implicit_prm", "rm", "oracle", "majority", "weighted_majority"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_selector_is_the_mean_over_all_orders(selector: str, n: int) -> None:
    generator = random.Random(n)
    for _ in range(6):
        answers = tuple(generator.choice(["7", "12", "12", None]) for _ in range(5))
        scores = tuple(generator.choice([-1.0, 0.3, 0.3, 2.0]) for _ in range(5))  # ties on purpose
        samples = Samples(tuple(float(answer == "7") for answer in answers), answers, scores)
        assert select_answers([samples], selector, n).value == pytest.approx(
            brute(samples, selector, n), abs=1e-12
        )


def test_the_worked_vote() -> None:
    # arXiv:2412.01981: "12" 1.280635 against "7" 1.400924, where plain majority says "12"
    samples = Samples((0, 0, 1, 0, 1), ("12", "12", "7", "12", "7"), (0.1, -0.6, 0.9, -0.4, 0.8))
    accuracies = {
        name: select_answers([samples], name, 5).value
        for name in ("weighted_majority", "majority", "implicit_prm", "oracle")
    }
    assert accuracies == {"weighted_majority": 1.0, "majority": 0.0, "implicit_prm": 1.0, "oracle": 1.0}


def test_one_sample_is_chosen_by_nobody() -> None:
    samples = Samples((1.0, 0.0, 0.0, 1.0), ("a", "b", "b", "a"), (0.0, 1.0, 2.0, 3.0))
    for name in ("weighted_majority", "majority", "implicit_prm", "oracle"):
        assert select_answers([samples], name, 1).value == pytest.approx(0.5)


def test_many_samples_are_counted_over_a_sample_of_their_subsets() -> None:
    # 20 of 40 right with one answer against all others different: a vote of 8 is lost only with fewer than 2
    # right ones or in a tie
    answers = ["right"] * 20 + [f"wrong {i}" for i in range(20)]
    correct = [1.0] * 20 + [0.0] * 20
    none_right, one_right = (math.comb(20, k) * math.comb(20, 8 - k) / math.comb(40, 8) for k in (0, 1))
    assert expected_vote(correct, answers, [1.0] * 40, 8) == pytest.approx(
        1 - none_right - one_right * 7 / 8, abs=3e-3
    )


def test_accuracy_comes_with_an_interval_and_the_kl_that_choosing_spends() -> None:
    prompts = [Samples((1.0, 0.0), ("a", "b"), (1.0, 0.0)), Samples((0.0, 0.0), ("a", "b"), (1.0, 0.0))] * 20
    single, pair = selections(prompts, "implicit_prm", (1, 2))
    assert (single.accuracy.value, pair.accuracy.value) == (0.25, 0.5)
    metrics = pair.metrics()
    assert metrics["eval/implicit_prm@2_low"] < 0.5 < metrics["eval/implicit_prm@2_high"]
    assert metrics["eval/kl_spent@2"] == pytest.approx(math.log(2) - 0.5)
    with pytest.raises(ValueError, match="n lies between 1 and 2"):
        selections(prompts, "majority", (3,))
