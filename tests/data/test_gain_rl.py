"""GAIN-RL's order: the shape of the window, how it moves, and that a resumed order draws the same prompts."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from rltrain.config.rules.registries import ORDERS
from rltrain.data.gain_rl import GainRlOrder, log_weights, stride, template_lengths

METRICS = {"reward/correct": 0.5, "control/alignment": 0.3}


def order_of(count: int = 50, per_step: int = 4, seed: int = 0, **hp: float) -> GainRlOrder:
    """An order in which rank i is index i."""
    return GainRlOrder(count, per_step, seed, [float(-index) for index in range(count)], **hp)


def test_the_window_is_the_released_gaussian() -> None:
    weights = np.exp(log_weights(5, 0.0, 2.0))
    expected = [
        0.33909623854047366,
        0.2992513801900551,
        0.205672265268026,
        0.1100884305141003,
        0.045891685487344985,
    ]
    np.testing.assert_allclose(weights / weights.sum(), expected)


def test_the_centre_moves_as_intended_and_as_released() -> None:
    # The released TRL code halves its rewards 0, 1, 2; unchanged 0/1 rewards give the same three moves.
    # If they are halved as well, as in the released verl version, all correct counts as half correct.
    assert [stride(right, 0.3, 500.0, 2.0, 0.5, 1000.0) for right in (0.0, 0.5, 1.0)] == pytest.approx(
        [0.0, 268.5247834990176, 649.3218614769]
    )
    order = order_of(5000, accuracy_scale=0.5)
    order.observe({"reward/correct": 1.0, "control/alignment": 0.3})
    assert order.centre == pytest.approx(268.5247834990176)


def test_prompts_come_by_score_and_ties_by_place() -> None:
    order = GainRlOrder(4, 4, 0, [0.1, 0.9, 0.5, 0.9])
    assert order.ranking == [1, 3, 2, 0]
    assert order.next() == [1, 3, 2, 0]


def test_draws_follow_the_window_without_replacement() -> None:
    # 2 of 5 ranks, sigma 2: by hand, P(rank 0 is drawn) = p0 + sum_j p_j p0 / (1 - p_j)
    order = order_of(5, 2, sigma=2.0)
    drawn = Counter[int]()
    for _ in range(4000):
        step = order.next()
        assert len(set(step)) == 2
        drawn.update(step)
    p = np.exp(log_weights(5, 0.0, 2.0))
    p /= p.sum()
    for rank in range(5):
        expected = p[rank] + sum(p[j] * p[rank] / (1 - p[j]) for j in range(5) if j != rank)
        assert drawn[rank] / 4000 == pytest.approx(expected, abs=0.03)  # 4 standard deviations of 4000 draws


def test_a_narrow_window_far_down_the_list_still_fills_a_step() -> None:
    order = order_of(1000, 8, sigma=0.5)  # weights beyond 20 ranks underflow to 0
    order.centre = 700.0
    assert len(set(order.next())) == 8
    assert all(690 < index < 710 for index in order.next())


def test_the_centre_never_goes_back_and_stays_on_the_list() -> None:
    order = order_of(400)
    centres = [0.0]
    for accuracy in (0.0, 1.0, 0.0, 0.2, 1.0, 1.0):
        order.observe({"reward/correct": accuracy, "control/alignment": 0.1})
        centres.append(order.centre)
    assert centres == sorted(centres) and centres[-1] == 399


def test_a_step_without_verdicts_moves_nothing_and_mean_reward_stands_in_for_correctness() -> None:
    order = order_of(5000)
    other = order_of(5000)
    order.observe({"reward/mean": math.nan, "control/alignment": 0.3})
    assert order.centre == 0.0
    order.observe({"reward/mean": 0.5, "control/alignment": 0.3})
    other.observe(METRICS)
    assert order.centre == other.centre > 0


def test_a_resumed_order_draws_what_the_first_would_have() -> None:
    uninterrupted = order_of(sigma=10.0)
    expected = []
    for _ in range(10):
        expected.append(uninterrupted.next())
        uninterrupted.observe({**METRICS, "control/alignment": 0.001})
    first = order_of(sigma=10.0)
    for _ in range(5):
        first.next()
        first.observe({**METRICS, "control/alignment": 0.001})
    second = GainRlOrder(50, 4, 0, [], sigma=10.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed_steps = []
    for _ in range(5):
        resumed_steps.append(second.next())
        second.observe({**METRICS, "control/alignment": 0.001})
    assert resumed_steps == expected[5:] and len({tuple(step) for step in expected}) == 10


@pytest.mark.parametrize("change", [{"count": 51}, {"per_step": 5}, {"seed": 1}])
def test_another_runs_state_is_refused(change: dict[str, int]) -> None:
    state = order_of().state_dict()
    with pytest.raises(ValueError, match="cannot be continued"):
        order_of().load_state_dict(state | change)
    del state["ranking"]
    with pytest.raises(ValueError, match="not gain_rl's"):
        order_of().load_state_dict(state)


def test_what_all_prompts_share_at_their_ends_is_the_template() -> None:
    assert template_lengths([(1, 2, 7, 8, 3), (1, 2, 9, 3), (1, 2, 7, 5, 5, 3)]) == (2, 1)
    assert template_lengths([(4, 5), (6, 7)]) == (0, 0)
    assert template_lengths([(1, 2, 3), (1, 2, 3)]) == (2, 0)  # at least one token remains between them
    assert template_lengths([(1, 9, 1), (1, 9, 9, 1)]) == (2, 0)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="a step needs 8 different prompts and the training set has 5"):
        GainRlOrder(5, 8, 0, [])
    with pytest.raises(ValueError, match="sigma is 0"):
        order_of(sigma=0.0)


def test_both_orders_are_registered() -> None:
    assert ORDERS.names() == ["shuffled", "gain_rl"]
    assert ORDERS.spec("gain_rl").needs == {"alignment"}
