"""Rewards of models beside those of a pool: weights, names, and completions that one of them cannot grade."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from rltrain.reward.score import RewardInputs, Score
from rltrain.rollout.model_rewards import ModelGrader, ModelReward


def inputs(*completions: str) -> RewardInputs:
    return RewardInputs("p", completions, (1,) * len(completions), ("stop",) * len(completions), {})


def by_text(path: str, *, prompt_column: str | None, max_tokens: int) -> Any:
    """A scorer whose number is the completion itself."""
    del path, prompt_column, max_tokens
    return lambda rows: [float(inputs.completions[place]) for inputs, place in rows]


class Pool:
    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        return [
            [
                Score(1.0, {"exact": 1.0, "correct": 1.0}, answer="a")
                if completion != "9"
                else Score(0.0, ungraded="timeout")
                for completion in group.completions
            ]
            for group in groups
        ]


def test_scores_come_back_by_group_and_row_with_their_weight():
    grader = ModelGrader(None, [("reward_model", 0.5, ModelReward(by_text))])
    scores = grader.score([inputs("1", "-2"), inputs("3")])
    assert scores == [
        [Score(0.5, {"reward_model": 1.0}), Score(-1.0, {"reward_model": -2.0})],
        [Score(1.5, {"reward_model": 3.0})],
    ]


def test_they_are_added_to_the_pools_and_keep_its_verdict_and_answer():
    grader = ModelGrader(
        Pool(),
        [
            ("reward_model", 2.0, ModelReward(by_text)),
            ("reward_model", 1.0, ModelReward(by_text, squash="sigmoid")),
        ],
    )
    [[score]] = grader.score([inputs("3")])
    # 1 + 2 * 3 + sigmoid(3)
    assert score.value == pytest.approx(7 + 1 / (1 + math.exp(-3)))
    assert score.parts == {
        "exact": 1.0,
        "correct": 1.0,
        "reward_model": 3.0,
        "reward_model#2": pytest.approx(1 / (1 + math.exp(-3))),
    }
    assert score.correct is True and score.answer == "a"


@pytest.mark.parametrize(
    ("completion", "ungraded"), [("nan", "reward_model/nan"), ("inf", "reward_model/nan"), ("9", "timeout")]
)
def test_a_completion_that_one_cannot_grade_is_ungraded(completion: str, ungraded: str):
    [[bad, good]] = ModelGrader(Pool(), [("reward_model", 1.0, ModelReward(by_text))]).score(
        [inputs(completion, "1")]
    )
    assert (bad, good.value) == (Score(0.0, ungraded=ungraded), 2.0)


def test_a_large_number_is_squashed_without_overflow():
    [[low, high]] = ModelGrader(None, [("r", 1.0, ModelReward(by_text, squash="sigmoid"))]).score(
        [inputs("-1e4", "1e4")]
    )
    assert (low.value, high.value) == (0.0, 1.0)
