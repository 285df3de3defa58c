"""The environment's own verdict as a reward."""

from __future__ import annotations

from reward.score import RewardInputs, Score, reward


@reward("episode")
def episode(inputs: RewardInputs, *, scale: float = 1.0) -> list[Score]:
    """``scale`` times the sum of the rewards that the environment gave in the course of the episode; its
    parts are the score's.

    Raises ValueError where completions are no episodes.
    """
    if len(inputs.episodes) != len(inputs.completions):
        raise ValueError(
            "episode: these completions are no episodes; set rollout.environment, or use another reward "
            "function"
        )
    return [Score(scale * one.reward, dict(one.parts)) for one in inputs.episodes]
