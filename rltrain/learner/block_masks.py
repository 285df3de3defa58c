"""Block-sparse masks of packed lines, for PyTorch's flex_attention: rows of one prompt share it, and lines of
several prompts stand in one sequence.

No mask of all pairs exists: the kernel reads the pairs of blocks in which some position attends, and
evaluates the rule inside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BLOCK", "Segment", "attending_blocks", "block_mask"]

BLOCK = 128  # positions on a side of a block; flex_attention's own choice


class Segment(NamedTuple):
    """Positions [start, stop) of a prompt, or of a completion that follows the prompt at [prompt_start,
    prompt_stop).
    """

    start: int
    stop: int
    prompt_start: int
    prompt_stop: int


def block_mask(segments: Iterable[Segment], device: torch.device | str) -> BlockMask:
    """The mask of a sequence of ``segments``, in order and without gaps: a position attends to the prompt and
    to its own segment, up to itself.
    """
    segments = tuple(segments)
    lengths = torch.tensor([segment.stop - segment.start for segment in segments], device=device)
    segment_start = torch.tensor([segment.start for segment in segments], device=device).repeat_interleave(
        lengths
    )
    prompt_start = torch.tensor([segment.prompt_start for segment in segments], device=device)
    prompt_stop = torch.tensor([segment.prompt_stop for segment in segments], device=device)
    first, last = (bound.repeat_interleave(lengths) for bound in (prompt_start, prompt_stop))

    def attends(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (first[query] <= key) & (key < last[query])
        return (key <= query) & (in_prompt | (segment_start[query] <= key))

    attending = torch.from_numpy(attending_blocks(segments)).to(device)
    counts = attending.sum(dim=1, dtype=torch.int32)
    indices = torch.argsort(attending.int(), dim=1, descending=True, stable=True).to(torch.int32)
    size = segments[-1].stop
    return BlockMask.from_kv_blocks(
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=attends,
        seq_lengths=(size, size),
    )


def attending_blocks(segments: Iterable[Segment]) -> np.ndarray:
    """(n, n) bool: whether any position of a block of queries attends to one of a block of keys."""
    segments = tuple(segments)
    count = -(-segments[-1].stop // BLOCK)
    attending = np.zeros((count, count), bool)
    for start, stop, prompt_start, prompt_stop in segments:
        if start == stop:
            continue
        queries = slice(start // BLOCK, (stop - 1) // BLOCK + 1)
        attending[queries, prompt_start // BLOCK : (prompt_stop - 1) // BLOCK + 1] = True
        attending[queries, queries] = True
    return np.tril(attending)
