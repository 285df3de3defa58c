"""No reward, for data without verdicts."""

from __future__ import annotations

from rltrain.reward.score import RewardInputs, Score, reward


@reward("none", traits={"no_signal"})
def none(inputs: RewardInputs) -> list[Score]:
    """0 for every completion, without a verdict: for a loss that reads no reward, on prompts without
    answers."""
    return [Score(0.0) for _ in inputs.completions]
