"""Keys and values of the rows being decoded, written in place, and the attention that reads them.

Every row is left-aligned: its token at position p is in column p, so that position, column and rotary angle
agree and a row can enter at any time. Columns beyond a row's length contain stale but finite numbers and are
masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROUPED_SDPA = "rltrain_grouped_sdpa"


def layers_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that a model's own forward cached, in the form that ``DecodeCache.admit`` takes."""
    layers: list[Any] = cache.layers
    return [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in layers]


class DecodeCache(Cache):
    """``slots`` rows of up to ``width`` columns; ``width`` grows on demand, so that memory follows the
    longest live row.

    ``DynamicCache`` copies the whole cache for every token; this class copies a single column. Rows 0..R-1
    are live; the caller keeps them contiguous.
    """

    def __init__(self, slots: int, width: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.width = width
        self.keys: list[Tensor] = []  # per layer (slots, width, key-value heads, head size)
        self.values: list[Tensor] = []
        self._rows = 0
        self._columns = 0
        # (R,) flat index of the column that each live row writes
        self._targets = torch.empty(0, dtype=torch.int64)

    def admit(self, prompts: Sequence[tuple[Tensor, Tensor]], source: Tensor, start: int) -> None:
        """Copies rows ``source (n,)`` of a prefill into slots start..start+n-1. A row may occur many times.

        prompts: each layer's keys and values, (U, columns, key-value heads, head size).
        """
        rows = slice(start, start + source.shape[0])
        for index, (keys, values) in enumerate(prompts):
            if index == len(self.keys):
                self.keys.append(self._new_buffer(keys))
                self.values.append(self._new_buffer(values))
            self.keys[index][rows, : keys.shape[1]] = keys[source]
            self.values[index][rows, : values.shape[1]] = values[source]

    def move(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies slots ``source`` over slots ``target``, to fill the slots of finished rows."""
        if not source:
            return
        for buffer in (*self.keys, *self.values):
            buffer[list(target), : self._columns] = buffer[list(source), : self._columns]

    def reserve(self, columns: int, limit: int) -> None:
        """Makes room for ``columns``, growing by half at a time up to ``limit``."""
        if columns <= self.width:
            return
        added = min(limit, max(columns, self.width + self.width // 2)) - self.width
        for buffers in (self.keys, self.values):
            for index, buffer in enumerate(buffers):
                buffers[index] = F.pad(buffer, (0, 0, 0, 0, 0, added))
        self.width += added

    def begin_step(self, positions: Tensor, columns: int) -> None:
        """Prepares the next forward, which writes column ``positions[r]`` of row r and reads columns
        0..columns-1 of every live row.
        """
        self._rows = positions.shape[0]
        self._columns = columns
        self._targets = torch.arange(self._rows, device=positions.device) * self.width + positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with (R, heads, 1, size); returns views of (R, heads,
        columns, size).
        """
        views = []
        for buffer, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            buffer.view(-1, *buffer.shape[2:]).index_copy_(0, self._targets, new.squeeze(2))
            views.append(buffer[: self._rows, : self._columns].transpose(1, 2))
        return views[0], views[1]

    def _new_buffer(self, states: Tensor) -> Tensor:
        # Zeros, not empty: a masked column still takes part in 0 * value, and NaN * 0 is NaN.
        size = (self.slots, self.width, *states.shape[2:])
        return torch.zeros(size, dtype=states.dtype, device=states.device)


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, except that the query heads of a single decoded token attend as rows of
    their key-value head.

    transformers repeats the whole cache once per query group at each step; folding (R, heads, 1, d) into
    (R, key-value heads, heads per key-value head, d) is the same arithmetic without the copies.
    """
    if query.shape[2] != 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows, heads, _, size = query.shape
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
