"""Fingerprints of weights of which every rank holds a part: sums over the parts, added in one reduction.

A part is a run of entries of the whole weight in row-major order: some rows (FSDP2), or any run (ZeRO-3).
u.y adds up over entries and |y|^2 over rows. A row that is cut between ranks is added first, in a place of
its own in the reduction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.tensor_ops import Fingerprint, product_sums, weight_product

__all__ = ["Block", "Run", "ShardSums"]


@dataclass(frozen=True)
class Run:
    """Entries of a weight that this rank holds: ``values (n,)`` begin at entry ``start`` of the whole."""

    values: Tensor
    start: int


@dataclass(frozen=True)
class Block:
    """A weight of a checkpoint: ``shape`` entries from ``start`` of the model's tensor ``source``."""

    source: str
    start: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


class ShardSums:
    """Which numbers the ranks add up.

    blocks: by checkpoint name. starts: of every rank's run of each source, by source; a run ends where the
    next begins.
    """

    def __init__(self, blocks: Mapping[str, Block], starts: Sequence[Mapping[str, int]]) -> None:
        self._blocks = blocks
        self._cut_rows: dict[str, tuple[int, ...]] = {}
        for name, block in blocks.items():
            cuts = {start[block.source] - block.start for start in starts if block.source in start}
            inside = {cut for cut in cuts if 0 < cut < block.entries}
            self._cut_rows[name] = tuple(
                sorted({cut // block.columns for cut in inside if cut % block.columns})
            )

    def shares(self, runs: Mapping[str, Run], device: torch.device) -> Tensor:
        """(2 x weights + cut rows,) float64: this rank's part of every sum. runs: by source."""
        sums = torch.zeros(2 * len(self._blocks), dtype=torch.float64, device=device)
        edges: list[Tensor] = []
        for place, (name, block) in enumerate(self._blocks.items()):
            edge = sums.new_zeros(len(self._cut_rows[name]))
            edges.append(edge)
            if (run := runs.get(block.source)) is not None:
                self._add(name, block, run, sums[2 * place : 2 * place + 2], edge)
        return torch.cat([sums, *edges])

    def _add(self, name: str, block: Block, run: Run, sums: Tensor, edge: Tensor) -> None:
        """Adds the entries of ``block`` in ``run`` to its ``sums (2,)`` and its cut rows ``edge``."""
        start = max(run.start - block.start, 0)
        stop = min(run.start + run.values.numel() - block.start, block.entries)
        if start >= stop:
            return
        offset = block.start - run.start
        columns = block.columns
        while start < stop:
            row, column = divmod(start, columns)
            is_whole = column == 0 and stop - start >= columns
            end = stop - (stop % columns) if is_whole else min(stop, (row + 1) * columns)
            values = run.values[offset + start : offset + end]
            rows = slice(row, row + max((end - start) // columns, 1))
            shape = (rows.stop - rows.start, -1) if len(block.shape) > 1 else (-1,)
            product = weight_product(name, values.view(shape), first_column=column, columns=columns)
            part = product_sums(name, product, rows=rows, count=block.rows)
            sums[0] += part[0]
            if is_whole:
                sums[1] += part[1] * part[1]
            else:
                edge[self._cut_rows[name].index(row)] += product[0]
            start = end

    def fingerprints(self, total: Tensor) -> dict[str, Fingerprint]:
        """From the sum of all ranks' ``shares``."""
        numbers = total.tolist()
        fingerprints: dict[str, Fingerprint] = {}
        edge = 2 * len(self._blocks)
        for place, (name, rows) in enumerate(self._cut_rows.items()):
            cut = numbers[edge : edge + len(rows)]
            edge += len(rows)
            projection, square = numbers[2 * place : 2 * place + 2]
            fingerprints[name] = Fingerprint(projection, square + sum(value * value for value in cut))
        return fingerprints
