"""Scalar rewards to advantages: ``(rewards (B,), group (B,), *, hp) -> (B,)``."""

from rltrain.registry import Registry

ADVANTAGES = Registry("advantage", modules=("rltrain.advantage.group",))
