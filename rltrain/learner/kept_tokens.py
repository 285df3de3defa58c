"""Log-probs over the tokens that truncated sampling kept.

An engine that samples with top-p, top-k, min-p or Top-H returns for each token the set that it was drawn
from. Every log-prob of the token, of whatever weights, is then taken over that set, so that the ratio of two
policies is that of the distributions that can have drawn it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rltrain.learner.packing import MicroBatch, ramp
from rltrain.types.policy import TokenRows

__all__ = ["LOG_KEPT_MASS", "KeptTokens", "log_kept_mass", "with_kept_tokens"]

LOG_KEPT_MASS = "log_kept_mass:kept"  # the statistic of the head, with the argument that it reads


@dataclass(frozen=True)
class KeptTokens:
    """The sets of n tokens, one after another. An empty set means the whole vocabulary."""

    ids: Tensor  # (m,) int64
    row: Tensor  # (m,) int64, the token that the set is of, from 0 to n - 1
    ends: np.ndarray  # (n + 1,) int64, sums of the sets' sizes from 0 on; never on a device

    def __getitem__(self, rows: slice) -> KeptTokens:
        """The sets of consecutive tokens."""
        low = int(self.ends[rows.start])
        high = int(self.ends[rows.stop])
        return KeptTokens(
            self.ids[low:high], self.row[low:high] - rows.start, self.ends[rows.start : rows.stop + 1] - low
        )


def log_kept_mass(logp: Tensor, targets: Tensor, kept: KeptTokens) -> Tensor:
    """(r,) ``ln sum p`` over the kept tokens of each row of log-probs (r, V); 0 where all are kept."""
    del targets
    if kept.ids.numel() == 0:
        return 0.0 * logp[:, 0]
    values = logp[kept.row, kept.ids]
    top = values.new_full((logp.shape[0],), -torch.inf)
    top = top.scatter_reduce(0, kept.row, values.detach(), "amax")
    has_set = top > -torch.inf
    top = torch.where(has_set, top, 0.0)
    sums = torch.zeros_like(top).index_add(0, kept.row, (values - top[kept.row]).exp())
    return torch.where(has_set, torch.where(has_set, sums, 1.0).log() + top, 0.0)


def with_kept_tokens(micro_batch: MicroBatch, rows: TokenRows) -> MicroBatch:
    """``micro_batch`` with the sets of its tokens, on its device; unchanged where none was truncated."""
    if rows.kept is None:
        return micro_batch
    kept = [rows.kept[row] for row in micro_batch.rows.tolist()]
    lengths = [len(rows.completions[row]) for row in micro_batch.rows.tolist()]
    sizes_of_rows = [
        np.zeros(length, np.int64) if sets is None else np.asarray(sets.sizes, np.int64)
        for sets, length in zip(kept, lengths, strict=True)
    ]
    empty = np.zeros(0, np.int64)
    ids = np.concatenate(
        [empty if sets is None else np.asarray(sets.ids, np.int64) for sets in kept] + [empty]
    )
    sizes = np.concatenate([*sizes_of_rows, empty])

    first = np.cumsum([0, *lengths])[:-1]  # of each row among the tokens of all rows
    tokens = first[micro_batch.row.cpu().numpy()] + micro_batch.column.cpu().numpy()
    starts = np.cumsum([0, *sizes])[tokens]
    sizes = sizes[tokens]
    device = micro_batch.targets.device
    chosen = ids[np.repeat(starts, sizes) + ramp(sizes)]
    sets = KeptTokens(
        torch.from_numpy(chosen).to(device),
        torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device),
        np.cumsum([0, *sizes]),
    )
    return dataclasses.replace(micro_batch, kept=sets)
