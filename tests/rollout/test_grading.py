"""Which groups dynamic sampling keeps: PRIME's middling accuracy (arXiv:2502.01456), DAPO's differing
verdicts (2503.14476).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rltrain.advantage.group import informative_groups
from rltrain.advantage.process import is_accuracy_within
from rltrain.reward.score import Score
from rltrain.rollout.grading import is_in_accuracy_range, is_informative
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span


def group_of(scores: list[Score]) -> ScoredGroup:
    completion = Completion((1,), (-1.0,), "stop", "1", (Span(0, 1, 0),))
    return ScoredGroup(0, Prompt("a", (1,), "a"), (completion,) * len(scores), tuple(scores))


def group(verdicts: list[float | None]) -> ScoredGroup:
    return group_of(
        [
            Score(0.0, ungraded="timeout") if verdict is None else Score(verdict, {"correct": verdict})
            for verdict in verdicts
        ]
    )


@pytest.mark.parametrize(
    ("verdicts", "kept"),
    [
        # n = 4 keeps 1/4, 2/4 and 3/4 of [0.2, 0.8]; n = 5 keeps the ends themselves; who is ungraded does
        # not count
        *[([1.0] * right + [0.0] * (4 - right), right in (1, 2, 3)) for right in range(5)],
        *[([1.0] * right + [0.0] * (5 - right), right in (1, 2, 3, 4)) for right in range(6)],
        ([1.0, None, None, None], False),
        ([1.0, 0.0, None, None], True),
        ([None, None], False),
    ],
)
def test_the_range_includes_its_ends(verdicts: list[float | None], kept: bool) -> None:
    assert is_in_accuracy_range(0.2, 0.8, group(verdicts)) is kept


def expected(values: list[float], low: float, high: float) -> tuple[bool, bool]:
    """The verdicts of the functions on float64 tensors: (in the range, informative)."""
    tensor = torch.tensor(values, dtype=torch.float64)
    ids = torch.zeros(len(values), dtype=torch.int64)
    within = is_accuracy_within(tensor, ids, low=low, high=high).any()
    return bool(within), bool(informative_groups(tensor, ids).any())


REWARDS = st.lists(
    st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0, -1.0]), st.floats(-1e6, 1e6, width=32)), max_size=40
)
SHARES = st.integers(0, 40).map(lambda count: count / 40)


@st.composite
def rewards_and_ends(draw: st.DrawFn) -> tuple[list[float], float, float]:
    """Rewards and the two ends of a range, each anywhere or where rounding decides which side the
    mean is on.
    """
    rewards = draw(REWARDS)
    mean = sum(rewards) / max(len(rewards), 1)
    close = [
        math.nextafter(mean + step, side)
        for step in (-1e-9, 1e-9)
        for side in (-math.inf, mean + step, math.inf)
    ]
    low, high = (draw(st.one_of(SHARES, st.sampled_from(close))) for _ in range(2))
    return rewards, low, high


@given(rewards_and_ends())
@example(([0.1, 0.1, 0.1], 0.0, 0.1 - 1e-9))  # summed and divided by 3 they are more than 0.1
@example(([], 0.0, 1.0))
def test_verdicts_on_rewards_are_those_of_the_tensor_functions(
    case: tuple[list[float], float, float],
) -> None:
    rewards, low, high = case
    group = group_of([*map(Score, rewards), Score(0.0, ungraded="timeout")])
    assert (is_in_accuracy_range(low, high, group), is_informative(group)) == expected(rewards, low, high)


@given(st.lists(st.booleans(), max_size=64), SHARES, SHARES)
def test_verdicts_on_correctness_are_those_of_the_tensor_functions(
    right: list[bool], low: float, high: float
) -> None:
    group = group_of(
        [Score(-0.25 * place, {"correct": float(verdict)}) for place, verdict in enumerate(right)]
    )
    results = is_in_accuracy_range(low, high, group), is_informative(group)
    assert results == expected([float(verdict) for verdict in right], low, high)
