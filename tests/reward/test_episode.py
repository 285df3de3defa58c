"""The environment's verdict as a reward."""

from __future__ import annotations

import pytest

from rltrain.reward.episode import episode
from rltrain.reward.score import Episode, RewardInputs, Score
from rltrain.reward.tasks import select_completion

PLAYED = RewardInputs(
    prompt="",
    completions=("a", "b"),
    token_counts=(1, 2),
    finish=("stop", "length"),
    columns={},
    episodes=(
        Episode(0.5, {"correct": 1.0, "moves": 3.0}, ("a",)),
        Episode(-1.0, {"correct": 0.0}, ("x", "b")),
    ),
)


def test_the_score_is_the_episode_s_with_its_parts() -> None:
    first, second = episode(PLAYED)
    assert (first, first.correct) == (Score(0.5, {"correct": 1.0, "moves": 3.0}), True)
    assert (second, second.correct) == (Score(-1.0, {"correct": 0.0}), False)
    assert episode(PLAYED, scale=2.0)[1].value == -2.0


def test_one_completion_of_several_takes_its_episode_along() -> None:
    assert episode(select_completion(PLAYED, 1)) == episode(PLAYED)[1:]


def test_what_is_no_episode_has_no_verdict() -> None:
    with pytest.raises(ValueError, match=r"rollout\.environment"):
        episode(RewardInputs("", ("a",), (1,), ("stop",), {}))
