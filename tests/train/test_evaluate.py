"""pass@k over graded groups."""

from __future__ import annotations

import pytest

from rltrain.reward.score import Score
from rltrain.train.evaluate import summarise
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span


def group(name: str, scores: list[Score]) -> ScoredGroup:
    completion = Completion((1, 2), (-1.0, -1.0), "stop", "x", (Span(0, 2, 0),))
    return ScoredGroup(0, Prompt(name, (1,), name), (completion,) * len(scores), tuple(scores))


def test_an_ungraded_completion_counts_as_wrong_and_is_reported() -> None:
    right, wrong, lost = (
        Score(1.0, {"correct": 1.0}),
        Score(0.0, {"correct": 0.0}),
        Score(0.0, ungraded="timeout"),
    )
    result = summarise([group("a", [right, wrong]), group("b", [lost, right])], n=2, k=(1, 2))
    # a: 1 of 2, b: 1 of 2 -> pass@1 = 0.5, pass@2 = 1; reward over the three graded = 2/3.
    assert [r.value for r in result.results] == [0.5, 1.0]
    assert result.reward == pytest.approx(2 / 3)
    assert (result.ungraded, result.tokens) == (1, 2.0)
    assert result.metrics()["eval/avg@2"] == 0.5


def test_rewards_that_do_not_say_what_is_correct_give_a_mean_and_no_pass_at_k() -> None:
    result = summarise([group("a", [Score(0.25), Score(0.75)])], n=2, k=(1,))
    assert result.results == ()
    assert result.metrics()["eval/reward"] == 0.5
    assert result.metrics()["eval/avg@2"] == 0.5
