"""What a layer's pass over some rows costs by kind of attention, and whether sharing a prompt pays on a GPU.

Rows of their own run the causal kernel, which skips the half above the diagonal and reads no mask. A line of
several rows with one prompt needs a mask of L x L entries: PyTorch then computes all pairs with a slower
kernel. So a shared prompt saves matrix products and may lose more in attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rltrain.learner.shared_prompt import line_length
from rltrain.types.policy import TokenRows

__all__ = ["MASKED_SCORES_PER_HIDDEN", "layer_cost", "sharing_pays"]

# Shares of a GPU's peak that kernels reach; estimates, as in rltrain/config/capacity/constants.py.
PRODUCT_RATE = 0.66
CAUSAL_RATE = 0.45  # flash attention
MASKED_RATE = 0.18  # with a dense mask

# A position's matrix products of a layer, about 24 H^2 FLOP, take as long as so many masked scores of 4 H
# FLOP, for each H.
MASKED_SCORES_PER_HIDDEN = 6 * MASKED_RATE / PRODUCT_RATE


def layer_cost(hidden: int, rows: Iterable[int], masked_lines: Iterable[int] = ()) -> float:
    """Time of a layer's forward pass, in FLOP at the peak rate.

    hidden: width H. rows: tokens of each row with a line of its own. masked_lines: of each line with a mask.
    """
    rows = tuple(rows)
    masked_lines = tuple(masked_lines)
    products = 24 * hidden**2 * (sum(rows) + sum(masked_lines)) / PRODUCT_RATE
    causal = 2 * hidden * sum(length**2 for length in rows) / CAUSAL_RATE
    masked = 4 * hidden * sum(length**2 for length in masked_lines) / MASKED_RATE
    return products + causal + masked


def sharing_pays(rows: TokenRows, lines: Sequence[Sequence[int]], *, hidden: int) -> bool:
    """Whether a GPU reads ``lines`` of row numbers in less time than every row in a line of its own."""
    lengths = [line_length(rows, line) for line in lines]
    shared = layer_cost(
        hidden,
        [length for line, length in zip(lines, lengths, strict=True) if len(line) == 1],
        [length for line, length in zip(lines, lengths, strict=True) if len(line) > 1],
    )
    return shared < layer_cost(hidden, [line_length(rows, [row]) for line in lines for row in line])
