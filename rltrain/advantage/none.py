"""No advantage, for losses that read no reward."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.advantage.group import as_float
from rltrain.needs import GROUPLESS, NO_SIGNAL, REWARD_FREE
from rltrain.registry import method

__all__ = ["none"]


@method("none", traits={GROUPLESS, NO_SIGNAL, REWARD_FREE})
def none(rewards: Tensor, group: Tensor) -> Tensor:
    """Zeros (B,): by definition nothing is learned from the rewards, which are still graded and reported.

    Formula: ``0``

    Use it with a policy loss that learns from the samples alone (``em_ft``, ``one_shot_em``); any other loss
    has no gradient then.
    """
    del group
    return torch.zeros_like(as_float(rewards))
