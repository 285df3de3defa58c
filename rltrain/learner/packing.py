"""Builds micro-batches from rows of tokens: which rows go together, and the tensors for the model and the
loss.

A row is a prompt and its completion. There are two layouts: ``padded`` (r, S), rows of about equal length
side by side, and ``packed`` (1, S), rows one after the other with restarting positions, for attention kernels
that support variable lengths. In the padded layout the rows of one prompt can share a line
(``shared_prompt.py``). Every layout gives every completion token the same log-prob. Loss masks are not used
here, so text that the policy did not write is scored as well.
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
from torch.nn.attention.flex_attention import BlockMask

from rltrain.types.policy import TokenRows

__all__ = ["Layout", "MicroBatch", "build", "plan", "ramp"]

Layout = Literal["padded", "packed"]


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step as the model reads them, and the source and target indices of each completion
    token's statistics.
    """

    rows: Tensor  # (r,) int64, positions in the step's batch; always on the CPU, like that batch
    input_ids: Tensor  # (r, S) padded, (1, S) packed, (lines, S) where rows share prompts; int64
    position_ids: Tensor  # shaped like input_ids; packed: restarts at 0 for every row
    # Shaped like input_ids, int64, for padding on the left; (lines, 1, S, S) bool where rows share prompts;
    # block-sparse where packed rows share prompts; otherwise None, since causal attention needs none.
    attention_mask: Tensor | BlockMask | None
    # (n,) int64, the index in the flattened hidden states of the one that predicts each completion token.
    index: Tensor
    targets: Tensor  # (n,) int64 completion tokens
    row: Tensor  # (n,) int64, row of a token's statistics in (r, width)
    column: Tensor  # (n,) int64, column of a token's statistics in (r, width)
    width: int  # completion tokens of the longest row, at least 1
    packed: bool
    kept: Any = None  # KeptTokens of the n tokens where sampling was truncated (``kept_tokens.py``)

    def to(self, device: torch.device | str) -> MicroBatch:
        """A copy with all tensors except ``rows`` on ``device``."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "rows"]
        values = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if isinstance(value, Tensor | BlockMask)
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
    """The micro-batch of the rows at ``positions``, each without its last token, which predicts nothing.

    Without positions it is one dummy token, so that a rank with no rows still joins its peers' collectives;
    its statistics have shape (0, 1) and give every parameter a gradient of zero. Raises ValueError on an
    empty prompt.
    """
    if len(positions) == 0:
        return _empty_micro_batch(packed=layout == "packed").to(device)

    tokens, before, after = _flatten(rows, positions)
    starts = _starts(before + after)
    lengths = before + np.maximum(after - 1, 0)
    place = ramp(lengths)  # of each token that is read, within its row
    read = tokens[np.repeat(starts, lengths) + place]
    mask = None
    if layout == "packed":
        first = _starts(lengths)  # of each row in the flattened hidden states
        input_ids = read[None]
        position_ids = place[None]
    else:
        count = len(lengths)
        longest = int(lengths.max())
        shift = longest - lengths if padding_side == "left" else np.zeros_like(lengths)
        first = np.arange(count) * longest + shift
        input_ids = np.zeros(count * longest, np.int64)
        input_ids[np.repeat(first, lengths) + place] = read
        input_ids = input_ids.reshape(count, longest)
        position_ids = np.maximum(np.arange(longest) - shift[:, None], 0)
        if padding_side == "left":
            mask = (np.arange(longest) >= shift[:, None]).astype(np.int64)

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


def _flatten(rows: TokenRows, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(all tokens of the rows, prompt lengths (r,), completion lengths (r,)), int64."""
    prompts = [rows.prompts[position] for position in positions]
    completions = [rows.completions[position] for position in positions]
    before = np.fromiter(map(len, prompts), np.int64, len(prompts))
    after = np.fromiter(map(len, completions), np.int64, len(completions))
    if (before == 0).any():
        position = positions[int(np.argmin(before))]
        raise ValueError(
            f"row {position} has an empty prompt: nothing predicts its first token; start the prompt with a "
            "BOS token"
        )
    pieces = chain.from_iterable(chain.from_iterable(zip(prompts, completions, strict=True)))
    return np.fromiter(pieces, np.int64, int((before + after).sum())), before, after


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of consecutive runs of these lengths begins."""
    return np.cumsum(counts) - counts


def ramp(counts: np.ndarray) -> np.ndarray:
    """0, 1, .. count - 1 for each of ``counts``, concatenated."""
    return np.arange(int(counts.sum())) - np.repeat(_starts(counts), counts)


def _empty_micro_batch(packed: bool) -> MicroBatch:
    """A micro-batch of no rows that reads one dummy token."""
    empty = torch.zeros(0, dtype=torch.int64)
    token = torch.zeros(1, 1, dtype=torch.int64)
    return MicroBatch(empty, token, token, None, empty, empty, empty, empty, width=1, packed=packed)


def plan(
    lengths: Sequence[int] | np.ndarray, budget: int, *, layout: Layout, ranks: int = 1
) -> list[list[list[int]]]:
    """For each rank its micro-batches, each a list of positions in ``lengths``; every rank has equally many,
    some of which may be empty.

    A micro-batch reads at most ``budget`` tokens, padding included; only a single row longer than the budget
    exceeds it. There are as few micro-batches as the budget allows (packed: as first-fit decreasing needs),
    rounded up to equally many per rank, and of about equal size; those that run at the same time on different
    ranks are next to each other in size. Deterministic.
    """
    if budget < 1 or ranks < 1:
        raise ValueError(f"token budget is {budget}, ranks are {ranks}: both must be at least 1")
    sizes = [int(length) for length in lengths]
    order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    bins = (_pack if layout == "packed" else _bucket)(order, sizes, budget, ranks)
    if layout == "packed":
        costs = [sum(sizes[row] for row in rows) for rows in bins]
    else:
        costs = [len(rows) * sizes[rows[0]] for rows in bins]
    bins = [bins[index] for index in sorted(range(len(bins)), key=lambda index: (-costs[index], index))]
    bins += [[] for _ in range(-len(bins) % ranks)]
    rounds = [bins[start : start + ranks] for start in range(0, len(bins), ranks)]
    # The largest of a round goes to the first rank and to the last by turns, so that the ranks' sums stay
    # close.
    dealt = [together if number % 2 == 0 else together[::-1] for number, together in enumerate(rounds)]
    planned = [[together[rank] for together in dealt] for rank in range(ranks)]

    planned_rows = chain.from_iterable(rows for micro_batches in planned for rows in micro_batches)
    assert sorted(planned_rows) == list(range(len(sizes))), "a row was lost or doubled"
    return planned


def _bucket(order: list[int], sizes: list[int], budget: int, ranks: int) -> list[list[int]]:
    """Runs of rows of falling length with rows x longest <= cap, for the smallest cap that needs no more
    runs than ``budget``.
    """
    if not order:
        return []
    count = _round_up(len(_runs(order, sizes, budget)), ranks, len(order))
    low = min(max(sizes[order[0]], 1), budget)
    high = budget
    while low < high:
        cap = (low + high) // 2
        if len(_runs(order, sizes, cap)) <= count:
            high = cap
        else:
            low = cap + 1
    return _runs(order, sizes, low)


def _runs(order: list[int], sizes: list[int], cap: int) -> list[list[int]]:
    """Runs of rows in this order, each with as many rows as rows x longest <= cap allows, at least one."""
    runs = []
    start = 0
    while start < len(order):
        count = max(cap // max(sizes[order[start]], 1), 1)
        runs.append(order[start : start + count])
        start += count
    return runs


def _pack(order: list[int], sizes: list[int], budget: int, ranks: int) -> list[list[int]]:
    """Bins of about equal sums (each row, longest first, goes to the emptiest bin) where they fit the budget;
    otherwise bins by first-fit decreasing.
    """
    fitted = _first_fit(order, sizes, budget)
    count = _round_up(len(fitted), ranks, len(order))
    even: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for row in order:
        filled, index = heapq.heappop(heap)
        even[index].append(row)
        heapq.heappush(heap, (filled + sizes[row], index))
    fits = all(len(rows) == 1 or sum(sizes[row] for row in rows) <= budget for rows in even)
    return even if fits else fitted


def _first_fit(order: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    """Each row in the first bin with room for it, or in a new one."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in order:
        index = next((index for index, tokens in enumerate(room) if tokens >= sizes[row]), None)
        if index is None:
            bins.append([row])
            room.append(budget - sizes[row])
        else:
            bins[index].append(row)
            room[index] -= sizes[row]
    return bins


def _round_up(bins: int, ranks: int, rows: int) -> int:
    """The next multiple of ``ranks``, but never more bins than rows."""
    return min(-(-bins // ranks) * ranks, rows)
