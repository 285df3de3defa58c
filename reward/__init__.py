"""Graders. Nothing here imports rltrain or torch; ``MODULES`` lists the files that declare rewards."""

from reward.score import RewardInputs, Score, reward

MODULES = ("reward.math_answer", "reward.text", "reward.length")

__all__ = ["MODULES", "RewardInputs", "Score", "reward"]
