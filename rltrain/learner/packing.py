"""Rows of tokens to micro-batches: which rows go together, and the tensors the model and the loss need of
them.

A row is a prompt and its completion. Two layouts: ``padded`` (r, S), rows of about equal length side by side,
and ``packed`` (1, S), rows one after the other with positions that restart, for attention kernels that know
variable lengths. In the padded layout the rows of one prompt can share a line (``shared_prompt.py``). Every
form gives every completion token the same log-prob; masks of the loss play no part here, so text the policy
did not write is scored as well.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rltrain.types.policy import TokenRows

__all__ = ["Layout", "MicroBatch", "build", "plan", "ramp"]

Layout = Literal["padded", "packed"]


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step, as the model reads them, and where each completion token's statistics come
    from and go to.
    """

    rows: Tensor  # (r,) int64, positions in the step's batch; always on the CPU, where that batch is
    input_ids: Tensor  # (r, S) padded, (1, S) packed, (lines, S) where rows share prompts; int64
    position_ids: Tensor  # as input_ids; packed: from 0 again at every row
    # As input_ids, int64, for padding on the left; (lines, 1, S, S) bool where rows share prompts; causal
    # attention needs none otherwise.
    attention_mask: Tensor | None
    index: (
        Tensor  # (n,) int64, into the flattened hidden states, of the one that predicts each completion token
    )
    targets: Tensor  # (n,) int64 completion tokens
    row: Tensor  # (n,) int64, where a token's statistics go in (r, width)
    column: Tensor  # (n,) int64
    width: int  # completion tokens of the longest row, at least 1
    packed: bool

    def to(self, device: torch.device | str) -> MicroBatch:
        """What the model reads, on ``device``."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "rows"
        }
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)


def build(
    rows: TokenRows,
    positions: Sequence[int],
    *,
    layout: Layout,
    device: torch.device | str = "cpu",
    padding_side: Literal["left", "right"] = "right",
) -> MicroBatch:
    """The micro-batch of the rows at ``positions``. The last token of a completion predicts nothing and is
    not read.

    No positions: one dummy token, so that a rank with nothing to do still takes part in its peers'
    collectives; its statistics have shape (0, 1) and carry a zero gradient to every parameter. Raises
    ValueError on an empty prompt.
    """
    if len(positions) == 0:
        return _nothing(packed=layout == "packed").to(device)
    tokens, before, after = _flattened(rows, positions)
    starts, lengths = _starts(before + after), before + np.maximum(after - 1, 0)
    place = ramp(lengths)  # of each token that is read, within its row
    read = tokens[np.repeat(starts, lengths) + place]
    mask = None
    if layout == "packed":
        first = _starts(lengths)  # of each row in the flattened hidden states
        input_ids, position_ids = read[None], place[None]
    else:
        count, longest = len(lengths), int(lengths.max())
        shift = longest - lengths if padding_side == "left" else np.zeros_like(lengths)
        first = np.arange(count) * longest + shift
        input_ids = np.zeros(count * longest, np.int64)
        input_ids[np.repeat(first, lengths) + place] = read
        input_ids = input_ids.reshape(count, longest)
        position_ids = np.maximum(np.arange(longest) - shift[:, None], 0)
        mask = (np.arange(longest) >= shift[:, None]).astype(np.int64) if padding_side == "left" else None
    column = ramp(after)
    arrays = {
        "rows": np.asarray(positions, np.int64),
        "input_ids": input_ids,
        "position_ids": position_ids,
        "index": np.repeat(first + before - 1, after) + column,
        "targets": tokens[np.repeat(starts + before, after) + column],
        "row": np.repeat(np.arange(len(after)), after),
        "column": column,
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    attention_mask = None if mask is None else torch.from_numpy(mask)
    return MicroBatch(
        **tensors, attention_mask=attention_mask, width=max(int(after.max()), 1), packed=layout == "packed"
    ).to(device)


def _flattened(rows: TokenRows, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(all tokens of the rows, prompt lengths (r,), completion lengths (r,)), int64."""
    prompts, completions = [rows.prompts[at] for at in positions], [rows.completions[at] for at in positions]
    before = np.fromiter(map(len, prompts), np.int64, len(prompts))
    after = np.fromiter(map(len, completions), np.int64, len(completions))
    if (before == 0).any():
        at = positions[int(np.argmin(before))]
        raise ValueError(
            f"row {at} has an empty prompt: nothing predicts its first token; start the prompt with a BOS "
            "token"
        )
    pieces = chain.from_iterable(chain.from_iterable(zip(prompts, completions, strict=True)))
    return np.fromiter(pieces, np.int64, int((before + after).sum())), before, after


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def ramp(counts: np.ndarray) -> np.ndarray:
    """0, 1, .. count - 1 for each of ``counts``, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(_starts(counts), counts)


def _nothing(packed: bool) -> MicroBatch:
    none, token = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    return MicroBatch(none, token, token, None, none, none, none, none, width=1, packed=packed)


def plan(
    lengths: Sequence[int] | np.ndarray, budget: int, *, layout: Layout, ranks: int = 1
) -> list[list[list[int]]]:
    """For each rank its micro-batches, each a list of positions in ``lengths``; every rank has equally many,
    some maybe empty.

    A micro-batch reads at most ``budget`` tokens, padding included; only a row longer than the budget exceeds
    it, alone. Micro-batches are as few as the budget allows (packed: as first-fit decreasing finds), rounded
    up to equally many per rank, and about equally large; those that run at the same time on different ranks
    are neighbours in size. Deterministic.
    """
    if budget < 1 or ranks < 1:
        raise ValueError(f"token budget is {budget}, ranks are {ranks}: both must be at least 1")
    sizes = [int(length) for length in lengths]
    order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    bins = (_pack if layout == "packed" else _bucket)(order, sizes, budget, ranks)
    cost = [
        sum(sizes[row] for row in rows) if layout == "packed" else len(rows) * sizes[rows[0]] for rows in bins
    ]
    bins = [bins[at] for at in sorted(range(len(bins)), key=lambda at: (-cost[at], at))]
    bins += [[] for _ in range(-len(bins) % ranks)]
    rounds = [bins[at : at + ranks] for at in range(0, len(bins), ranks)]
    # The largest of a round goes to the first rank and to the last in turn, so that the ranks' sums stay
    # close.
    dealt = [together if number % 2 == 0 else together[::-1] for number, together in enumerate(rounds)]
    planned = [[together[rank] for together in dealt] for rank in range(ranks)]
    assert sorted(row for rank in planned for rows in rank for row in rows) == list(range(len(sizes))), (
        "a row was lost or doubled"
    )
    return planned


def _bucket(order: list[int], sizes: list[int], budget: int, ranks: int) -> list[list[int]]:
    """Runs of rows of falling length with rows x longest <= cap, for the smallest cap that needs no
    more runs than ``budget``.
    """
    if not order:
        return []
    wanted = _rounded_up(len(_runs(order, sizes, budget)), ranks, len(order))
    low, high = min(max(sizes[order[0]], 1), budget), budget
    while low < high:
        cap = (low + high) // 2
        low, high = (low, cap) if len(_runs(order, sizes, cap)) <= wanted else (cap + 1, high)
    return _runs(order, sizes, low)


def _runs(order: list[int], sizes: list[int], cap: int) -> list[list[int]]:
    runs, at = [], 0
    while at < len(order):
        count = max(cap // max(sizes[order[at]], 1), 1)
        runs.append(order[at : at + count])
        at += count
    return runs


def _pack(order: list[int], sizes: list[int], budget: int, ranks: int) -> list[list[int]]:
    """Equal sums where that fits the budget (each row, longest first, to the emptiest bin), else
    first-fit decreasing.
    """
    fitted = _first_fit(order, sizes, budget)
    wanted = _rounded_up(len(fitted), ranks, len(order))
    even: list[list[int]] = [[] for _ in range(wanted)]
    heap = [(0, at) for at in range(wanted)]
    for row in order:
        filled, at = heapq.heappop(heap)
        even[at].append(row)
        heapq.heappush(heap, (filled + sizes[row], at))
    fits = all(len(rows) == 1 or sum(sizes[row] for row in rows) <= budget for rows in even)
    return even if fits else fitted


def _first_fit(order: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for row in order:
        at = next((at for at, left in enumerate(room) if left >= sizes[row]), None)
        if at is None:
            bins.append([row])
            room.append(budget - sizes[row])
        else:
            bins[at].append(row)
            room[at] -= sizes[row]
    return bins


def _rounded_up(bins: int, ranks: int, rows: int) -> int:
    """The next multiple of ``ranks``, but never more bins than rows."""
    return min(-(-bins // ranks) * ranks, rows)
