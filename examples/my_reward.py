"""A reward of one's own, named in a recipe as

reward: {functions: ['my_reward.py:digits']}
"""

from __future__ import annotations

from rltrain.reward import RewardInputs, Score


def digits(inputs: RewardInputs, *, digit: str = "7") -> list[Score]:
    """The share of ``digit`` among the characters of each completion; correct if it occurs at all."""
    shares = [text.count(digit) / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0)}) for share in shares]
