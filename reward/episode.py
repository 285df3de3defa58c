"""The environment's own verdict as a reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rltrain.reward.score import RewardInputs, Score, reward


def check_environment(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    if recipe.rollout.environment is None:
        yield "it is the verdict of an environment, and there is none; set rollout.environment"


@reward("episode", traits={"reports_correct", "reads_environment"}, check=check_environment)
def episode(inputs: RewardInputs, *, scale: float = 1.0) -> list[Score]:
    """``scale`` times the sum of the environment's rewards over the episode, with the episode's parts.

    Raises ValueError if the completions are not episodes.
    """
    if len(inputs.episodes) != len(inputs.completions):
        raise ValueError(
            "episode: these completions are not episodes; set rollout.environment, or use another reward "
            "function"
        )
    return [Score(scale * played.reward, dict(played.parts)) for played in inputs.episodes]
