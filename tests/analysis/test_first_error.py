"""Finding what is wrong: AUC against all pairs, intervals against the definition, first wrong steps
by hand.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from rltrain.analysis.first_error import (
    auc,
    auc_difference,
    aucs_within_clusters,
    clustered_auc,
    commonest_place,
    first_wrong,
    lowest_pick_chance,
)


def test_the_first_wrong_step_skips_what_nobody_judged():
    assert first_wrong([1, 1, 0, None, 0]) == 2
    assert first_wrong([None, False]) == 1
    assert first_wrong([True, None]) is None and first_wrong([]) is None


def test_the_lowest_step_is_shared_where_several_are_lowest():
    assert lowest_pick_chance([0.2, -1.0, 0.1], 1) == 1.0
    assert lowest_pick_chance([0.2, -1.0, 0.1], 0) == 0.0
    assert lowest_pick_chance([-1.0, -1.0, 0.1], 1) == 0.5
    assert lowest_pick_chance([0.0, 0.0, 0.0, 0.0], 3) == 0.25  # equal values are guessing
    with pytest.raises(ValueError, match="no place 3 among 3"):
        lowest_pick_chance([1.0, 2.0, 3.0], 3)
    with pytest.raises(ValueError, match="NaN"):
        lowest_pick_chance([1.0, math.nan], 0)


def test_the_commonest_place_is_that_of_solutions_as_long_or_in_proportion():
    examples = [(4, 2), (4, 2), (4, 0), (3, 1), (3, 0)]
    assert commonest_place(examples, 4) == 2
    assert commonest_place(examples, 3) == 0  # 0 and 1 once each: the earlier
    # places over last places: 2/3, 2/3, 0, 1/2, 0; of 7 steps that is 4, 4, 0, 3, 0: 0 and 4 twice each, the
    # earlier
    assert commonest_place(examples, 7) == 0
    assert commonest_place([*examples, (4, 2)], 7) == 4
    with pytest.raises(ValueError, match="no examples"):
        commonest_place([], 3)


@pytest.mark.parametrize("seed", range(4))
def test_auc_is_the_share_of_ordered_pairs_with_ties_half(seed: int):
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 6, 40).tolist()
    positive = (draw.random(40) < 0.4).tolist()
    pairs = [
        (a, b) for (a, p), (b, n) in product(zip(scores, positive, strict=True), repeat=2) if p and not n
    ]
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auc(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert auc([-score for score in scores], positive) == pytest.approx(1 - expected, abs=1e-12)


def test_auc_needs_both_kinds_and_numbers():
    with pytest.raises(ValueError, match="2 of 2 examples are positive"):
        auc([1.0, 2.0], [1, 1])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        auc([1.0, math.nan], [1, 0])
    with pytest.raises(ValueError, match="2 scores, 1 labels"):
        auc([1.0, 2.0], [1])


def test_the_interval_of_an_auc_draws_whole_clusters():
    # each cluster repeated four times carries no more information than once: the interval is that of the
    # single copies, whose clusters come in the same order and so in the same draws
    draw = np.random.default_rng(0)
    positive = (draw.random(80) < 0.5).astype(int)
    scores = draw.normal(size=80) + positive
    single = clustered_auc(scores, positive, range(80), seed=1, resamples=400)
    fourfold = clustered_auc(
        np.repeat(scores, 4), np.repeat(positive, 4), np.repeat(np.arange(80), 4), seed=1, resamples=400
    )
    assert (fourfold.value, fourfold.low, fourfold.high) == pytest.approx(
        (single.value, single.low, single.high), abs=1e-12
    )
    assert single.prompts == fourfold.prompts == 80
    assert single.low < single.value < single.high
    # and it is about as wide as the formula of Hanley and McNeil says (0.0527 either side of an AUC of 0.76
    # or so, times 1.96)
    a = single.value
    n = 40
    variance = (a * (1 - a) + (n - 1) * (a / (2 - a) - a * a) + (n - 1) * (2 * a * a / (1 + a) - a * a)) / (
        n * n
    )
    assert single.high - single.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.25)


def test_one_cluster_has_no_interval():
    estimate = clustered_auc([1.0, 2.0], [0, 1], [5, 5], seed=0)
    assert estimate.value == 1.0 and math.isnan(estimate.low) and math.isnan(estimate.high)


def test_a_difference_to_itself_is_none_and_a_better_score_is_above():
    draw = np.random.default_rng(3)
    positive = (draw.random(200) < 0.5).astype(int)
    good = draw.normal(size=200) + 2 * positive
    noise = draw.normal(size=200)
    difference = auc_difference(good, good, positive, range(200), seed=0, resamples=100)
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    better = auc_difference(good, noise, positive, range(200), seed=0, resamples=200)
    assert better.value == pytest.approx(auc(good, positive) - auc(noise, positive))
    assert 0 < better.low < better.value < better.high


def test_within_clusters_only_mixed_ones_count():
    # cluster 0: positive above negative, 1; cluster 1: the other way, 0; cluster 2 has one kind
    assert aucs_within_clusters([2, 1, 1, 2, 9], [1, 0, 1, 0, 1], [0, 0, 1, 1, 2]) == [1.0, 0.0]
    # scores that only tell clusters apart: perfect in sight of all, empty inside
    assert aucs_within_clusters([5, 5, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1]) == [0.5, 0.5]
