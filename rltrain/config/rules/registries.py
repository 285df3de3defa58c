"""The registries of methods that recipes name, except those defined next to their functions.

Imports no torch.
"""

from __future__ import annotations

from rltrain.advantage import ADVANTAGES
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.registry import Registry
from rltrain.reward import MODULES as REWARD_MODULES

REWARDS = Registry("reward", modules=(*REWARD_MODULES, "rltrain.rollout.model_rewards"), decorator="reward")
EXTRA_SAMPLES = Registry(
    "extra sample",
    modules=("rltrain.rollout.extra_samples",),
    interface=("code", "choose", "sample", "observe", "notes", "state_dict", "load_state_dict"),
)
ORDERS = Registry(
    "prompt order",
    modules=("rltrain.data.order", "rltrain.data.gain_rl"),
    interface=("next", "observe", "state_dict", "load_state_dict"),
)
JUDGES = Registry("judge", modules=("rltrain.rollout.pairs.judges",), interface=("prefers",))
ENVIRONMENTS = Registry(
    "environment",
    modules=("rltrain.rollout.environments.calculator", "rltrain.rollout.environments.text_game"),
)
REGISTRIES = (
    ADVANTAGES,
    TOKEN_CONTROLS,
    POLICY_LOSSES,
    LOSS_TERMS,
    AGGREGATES,
    REWARDS,
    EXTRA_SAMPLES,
    ORDERS,
    COEFFICIENTS,
    PREFERENCE_LOSSES,
    JUDGES,
)
