"""Graders. Nothing here imports torch, or anything else of rltrain; ``MODULES`` lists the files that declare
rewards.

The folder stands at the top of the repository; the link ``rltrain/reward`` makes it the package
``rltrain.reward``.
"""

from rltrain.reward.score import RewardInputs, Score, reward

MODULES = (
    *(
        "rltrain.reward.text",
        "rltrain.reward.length",
        "rltrain.reward.math_answer",
        "rltrain.reward.empo",
        "rltrain.reward.empo_model",
        "rltrain.reward.none",
        "rltrain.reward.episode",
    ),
    *(
        "rltrain.reward.code_tests",
        "rltrain.reward.code_io",
        "rltrain.reward.sql",
        "rltrain.reward.reward_model_http",
        "rltrain.reward.judge",
    ),
)

__all__ = ["MODULES", "RewardInputs", "Score", "reward"]
