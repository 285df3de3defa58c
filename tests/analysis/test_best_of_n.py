"""Choosing among n, and what it costs: arXiv:2404.01730 on four answers, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rltrain.analysis.best_of_n import (
    best,
    expected_best,
    kl_bound,
    majority,
    n_for_kl,
    vote_weights,
)

P0 = [0.4, 0.3, 0.2, 0.1]
REWARD = [0.0, 1.0, 2.0, 3.0]


def kl(p: np.ndarray, q: list[float]) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def best_of_n(probability: list[float] | np.ndarray, score: list[float] | np.ndarray, n: int) -> np.ndarray:
    """(K,) distribution of the best-scored of n draws from ``probability (K,)``; equal scores share in
    proportion to their probability.

    ``F(y)^n - F(y-)^n`` with F the distribution function of the score.
    """
    p = np.asarray(probability, dtype=np.float64)
    s = np.asarray(score, dtype=np.float64)
    below = (s[None, :] < s[:, None]) @ p
    mass = (s[:, None] == s[None, :]) @ p
    win = (below + mass) ** n - below**n
    return np.divide(win * p, mass, out=np.zeros_like(p), where=mass > 0)


def test_the_best_of_four():
    won = best_of_n(P0, REWARD, 4)
    np.testing.assert_allclose(won, [0.0256, 0.2145, 0.4160, 0.3439], atol=1e-9)
    assert kl(won, P0) == pytest.approx(0.587114, abs=1e-6)
    assert float(won @ REWARD) == pytest.approx(2.0782, abs=1e-6)


def test_the_bound():
    assert [kl_bound(n) for n in (2, 4, 16, 64)] == pytest.approx(
        [0.193147, 0.636294, 1.835089, 3.174508], abs=1e-6
    )
    assert kl_bound(1) == 0
    assert n_for_kl(kl_bound(16)) == pytest.approx(16)
    assert n_for_kl(0.0) == pytest.approx(1)
    with pytest.raises(ValueError, match="not negative"):
        n_for_kl(-0.1)
    with pytest.raises(ValueError, match="at least 1"):
        kl_bound(0)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_best_of_n_spends_no_more_than_the_bound_(n: int):
    rng = np.random.default_rng(n)
    p = rng.dirichlet(np.ones(7))
    score = rng.normal(size=7)
    won = best_of_n(p, score, n)
    assert won.sum() == pytest.approx(1.0)
    spent = kl(won, list(p))
    assert -1e-12 <= spent <= kl_bound(n) + 1e-12


def test_the_bound_is_reached_by_scores_without_atoms():
    # short of it by about 0.75 / 2000^2
    fine = np.full(2000, 1 / 2000)
    assert kl(best_of_n(fine, np.arange(2000), 4), list(fine)) == pytest.approx(kl_bound(4), abs=1e-6)


def test_ties_share_in_proportion():
    # scores 0, 1, 1: the tied pair together has 0.7 and wins 1 - 0.3^2 = 0.91 of two draws
    np.testing.assert_allclose(best_of_n([0.3, 0.5, 0.2], [0, 1, 1], 2), [0.09, 0.91 * 5 / 7, 0.91 * 2 / 7])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_choices(n: int):
    rewards = [0.2, 1.0, -0.5, 1.0, 0.7]
    scores = [3.0, 1.0, 2.0, 5.0, 4.0]
    choices = list(itertools.combinations(range(5), n))
    assert expected_best(rewards, n) == pytest.approx(
        np.mean([max(rewards[i] for i in chosen) for chosen in choices])
    )
    picked = [rewards[max(chosen, key=lambda i: scores[i])] for chosen in choices]
    assert expected_best(rewards, n, scores) == pytest.approx(np.mean(picked))


def test_samples_of_equal_score_share_their_places():
    # all scores equal: any choice of n is won by a random one, the mean reward
    assert expected_best([0.0, 1.0, 5.0], 2, [1.0, 1.0, 1.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="best of 4 cannot be estimated from 3"):
        expected_best([0.0, 1.0, 5.0], 4)


def test_votes_weighted_by_the_reward_model_can_turn_a_majority():
    answers = ["12", "12", "7", "12", "7"]
    scores = [0.10, -0.60, 0.90, -0.40, 0.80]
    assert best(scores) == 2
    weights = vote_weights(answers, scores)
    assert weights == pytest.approx({"12": 1.280635, "7": 1.400924}, abs=1e-6)
    assert majority(answers) == "12"
    assert majority(["b", "a", "a", "b"]) == "b"  # the first to appear
    # scores a thousand times smaller: every vote weighs a half, the majority is back
    faint = vote_weights(answers, [score / 1000 for score in scores])
    assert max(faint, key=lambda answer: faint[answer]) == "12"
    assert vote_weights(["x", "y"], [1e4, -1e4]) == {"x": 1.0, "y": 0.0}


def test_the_first_of_equal_scores_wins_and_nan_never():
    assert best([math.nan, 1.0, 3.0, 3.0, math.nan]) == 2
    with pytest.raises(ValueError, match="none of 2 answers has a score"):
        best([math.nan, math.nan])
