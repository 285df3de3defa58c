"""pass@k against every subset, intervals against exact resampling distributions."""

import itertools
import math
import random

import numpy as np
import pytest

from rltrain.report.statistics import (
    average,
    average_at_k,
    bootstrap_interval,
    calibration_error,
    clustered_average,
    paired_difference,
    pass_at_k,
    unbiased_pass_at_k,
)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert unbiased_pass_at_k(n, correct, k) == pytest.approx(
            sum(map(any, subsets)) / len(subsets), abs=1e-12
        )


def test_pass_at_k_by_hand():
    assert unbiased_pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert unbiased_pass_at_k(8, 2, 8) == 1.0
    assert unbiased_pass_at_k(8, 0, 8) == 0.0
    assert unbiased_pass_at_k(10, 3, 1) == pytest.approx(0.3)
    # 1 - (190 * ... * 183) / (200 * ... * 193)
    assert unbiased_pass_at_k(200, 10, 8) == pytest.approx(
        1 - math.prod((190 - i) / (200 - i) for i in range(8))
    )


def test_the_naive_formula_is_not_what_is_computed():
    assert unbiased_pass_at_k(4, 1, 2) != pytest.approx(1 - (1 - 1 / 4) ** 2)  # 0.4375, biased


def test_large_counts_do_not_overflow():
    assert unbiased_pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_counts_are_refused(n, correct, k):
    with pytest.raises(ValueError):
        unbiased_pass_at_k(n, correct, k)


def test_pass_at_k_over_prompts_is_the_mean_of_the_prompts():
    estimate = pass_at_k([0, 1, 4], n=4, k=2, seed=0)
    assert estimate.value == pytest.approx((0 + 0.5 + 1) / 3)
    assert (estimate.k, estimate.n, estimate.prompts) == (2, 4, 3)
    assert estimate.low <= estimate.value <= estimate.high
    assert pass_at_k([0, 1, 4], n=4, k=2, seed=0) == estimate  # seeded


def test_pass_at_one_is_the_average():
    counts = [random.Random(0).randint(0, 8) for _ in range(50)]
    scores = [[1.0] * count + [0.0] * (8 - count) for count in counts]
    pass_at_one = pass_at_k(counts, 8, 1, seed=3)
    mean = average_at_k(scores, seed=3)
    assert (pass_at_one.value, pass_at_one.low, pass_at_one.high) == pytest.approx(
        (mean.value, mean.low, mean.high)
    )


def test_prompts_weigh_the_same_whatever_their_number_of_completions():
    assert average_at_k([[1.0], [0.0, 0.0, 0.0]], seed=0).value == 0.5


def test_interval_of_one_success_in_six_is_the_binomials():
    # resampled mean = Binomial(6, 1/6) / 6; cumulative .335 .737 .938 .991: the 97.5 % quantile is 3 / 6
    assert bootstrap_interval([1, 0, 0, 0, 0, 0], seed=0) == (0.0, 0.5)


def test_interval_of_many_prompts_is_the_normal_one():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=4000)
    half_width = 1.959964 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values, seed=5)
    assert (low, high) == pytest.approx(
        (values.mean() - half_width, values.mean() + half_width), abs=0.05 * half_width
    )


def test_one_prompt_has_no_interval():
    estimate = average([0.5], seed=0)
    assert estimate.value == 0.5 and math.isnan(estimate.low) and math.isnan(estimate.high)


def test_no_prompts_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="no prompts"):
        pass_at_k([], 4, 1, seed=0)
    with pytest.raises(ValueError, match="1 of 2 prompts"):
        average_at_k([[1.0], []], seed=0)


def test_pairing_removes_the_spread_between_prompts():
    generator = random.Random(0)
    before = {f"p{i}": generator.random() for i in range(100)}  # spread of 0.29
    # the order of prompts does not matter
    after = {prompt: before[prompt] + 0.1 for prompt in reversed(before)}
    difference = paired_difference(before, after, seed=0)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    unpaired = average(list(before.values()), seed=0)
    assert unpaired.high - unpaired.low > 0.1


def test_difference_changes_sign_with_the_order_of_the_runs():
    first = {"a": 0.0, "b": 1.0, "c": 0.5}
    second = {"a": 1.0, "b": 1.0, "c": 0.0}
    assert (
        paired_difference(first, second, seed=0).value
        == -paired_difference(second, first, seed=0).value
        == pytest.approx(0.5 / 3)
    )


def test_runs_over_different_prompts_are_not_compared():
    with pytest.raises(ValueError, match="1 only the first, 2 only the second"):
        paired_difference({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 0.0, "d": 1.0}, seed=0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # 200 evaluations of 60 prompts with true pass@1 0.3: a 95 % interval should cover in 180 or more, and not
    # always
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(
            generator.binomial(8, generator.beta(0.6, 1.4, size=60)) / 8, seed=seed, resamples=1000
        )
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def test_a_mean_over_tokens_weighs_completions_by_their_length():
    # 6 over two tokens and 1 over one token: 7 / 3; drawn with replacement one prompt's mean is 3 and the
    # other's 1
    estimate = clustered_average([6.0, 1.0], [0, 1], counts=[2.0, 1.0], seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(7 / 3), 1.0, 3.0)
    assert clustered_average([6.0, 1.0], [0, 1], counts=[1.0, 1.0], seed=0) == clustered_average(
        [6.0, 1.0], [0, 1], seed=0
    )


def test_calibration_error_by_hand():
    # confidence 0.8 twice, right once (|0.8 - 0.5|), and 0.95 once, right (0.05): (2 x 0.3 + 0.05) / 3
    assert calibration_error([0.8, 0.8, 0.95], [1.0, 0.0, 1.0]) == pytest.approx((2 * 0.3 + 0.05) / 3)
    # one bin for both: mean p 0.775, mean d 0.5
    assert calibration_error([0.75, 0.8], [1.0, 0.0], bins=1) == pytest.approx(0.275)


def test_calibration_does_not_depend_on_which_side_is_named_first():
    generator = np.random.default_rng(0)
    p = generator.random(200)
    d = generator.random(200)
    mirrored = generator.random(200) < 0.5
    mirrored_error = calibration_error(
        np.where(mirrored, 1 - p, p).tolist(), np.where(mirrored, 1 - d, d).tolist()
    )
    assert calibration_error(p.tolist(), d.tolist()) == pytest.approx(mirrored_error)


def test_predictions_equal_to_the_degree_are_calibrated_and_no_opinion_is_no_error():
    p = np.random.default_rng(1).random(500)
    assert calibration_error(p.tolist(), p.tolist()) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error([0.5, 0.5], [1.0, 1.0]) == 0.0
    # outcomes drawn with the predicted probabilities: what is left is the sampling error of ten bins of
    # 50,000 pairs each
    many = np.random.default_rng(2).random(500_000)
    assert calibration_error(many.tolist(), (np.random.default_rng(3).random(500_000) < many).tolist()) < 0.01
    with pytest.raises(ValueError, match="no pairs"):
        calibration_error([], [])
