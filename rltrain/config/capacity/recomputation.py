"""How many layers a share of them is."""

from __future__ import annotations

import math


def recomputed_layers(layers: int, share: float) -> int:
    """The first layers of so many whose activations are computed again in the backward pass."""
    return math.ceil(round(share * layers, 6))
