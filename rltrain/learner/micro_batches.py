"""This rank's micro-batches: of rollout rows, or of judged examples whose rows belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.learner.adapter_off import FrozenModel
from rltrain.learner.attention_cost import MASKED_SCORES_PER_HIDDEN, sharing_pays
from rltrain.learner.kept_tokens import with_kept_tokens
from rltrain.learner.packing import MicroBatch, build, plan
from rltrain.learner.shared_prompt import (
    build_packed_lines,
    build_shared,
    line_length,
    lines_of,
    packed_lines,
)
from rltrain.learner.trained_model import TrainedModel
from rltrain.types.policy import TokenRows

__all__ = [
    "MicroBatches",
    "RowBuilder",
    "build_rows",
    "example_micro_batches",
    "inverse_index",
    "row_micro_batches",
    "shares_prompts",
    "tokens_read",
]

# Pairs share their prompts if that reads less than this share of the tokens of separate rows.
_SHARE_BELOW = 0.95

# Builds the micro-batch of the rows at some positions.
RowBuilder = Callable[[TrainedModel, TokenRows, Sequence[int]], MicroBatch]


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of this rank, each built when it is needed. Every rank has equally many, at least
    one.

    A rank without rows gets an empty one: with its gradient of 0, momentum and weight decay act as on the
    other ranks, and its passes join their collectives.
    """

    parts: Sequence[Any]
    build: Callable[[Any], MicroBatch]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.build, self.parts)


def shares_prompts(trained: TrainedModel, frozen: FrozenModel | None = None) -> bool:
    """Whether rows of one prompt may share it. frozen: the model that reads them; None: the trained one."""
    model = trained.unwrapped_model if frozen is None else frozen
    return trained.settings.share_prompt == "auto" and model.shares_prompts == trained.layout


def build_rows(trained: TrainedModel, rows: TokenRows, positions: Sequence[int]) -> MicroBatch:
    """The rows at ``positions`` as one micro-batch, without shared prompts."""
    return build(rows, positions, layout=trained.layout, device=trained.device)


# rows of rollouts -------------------------------------------------------------------------------------------


def row_micro_batches(
    trained: TrainedModel,
    rows: TokenRows,
    positions: Tensor,
    *,
    share: bool,
) -> MicroBatches:
    """Micro-batches of the rows at ``positions``.

    share: rows of one prompt may be read in one line, where that saves enough.
    """
    indices = positions.tolist()
    budget = trained.settings.tokens_per_micro_batch
    lines = [[index] for index in range(len(indices))]
    if share:
        lines = _shared_lines(trained, rows, indices)
    lines = [[indices[index] for index in line] for line in lines]

    sizes = [line_length(rows, line) for line in lines]
    planned = plan(sizes, budget, layout=trained.layout, ranks=trained.world_size)[trained.rank]
    parts = [[lines[number] for number in numbers] for numbers in planned]

    def build_lines(part: list[list[int]]) -> MicroBatch:
        if all(len(line) == 1 for line in part):
            micro_batch = build_rows(trained, rows, [row for [row] in part])
        elif trained.layout == "packed":
            micro_batch = build_packed_lines(rows, part, device=trained.device)
        else:
            micro_batch = build_shared(rows, part, device=trained.device)
        return with_kept_tokens(micro_batch, rows)

    return MicroBatches(parts or [[]], build_lines)


def _shared_lines(trained: TrainedModel, rows: TokenRows, indices: list[int]) -> list[list[int]]:
    """``lines_of`` by the device's rates: on a GPU a mask makes attention slower than matrix products."""
    hidden = trained.model.config.hidden_size
    budget = trained.settings.tokens_per_micro_batch
    if trained.layout == "packed":
        return packed_lines(rows, indices, budget=budget)
    if trained.device.type == "cpu":
        return lines_of(rows, indices, hidden=hidden, budget=budget)
    rate = MASKED_SCORES_PER_HIDDEN
    lines = lines_of(rows, indices, hidden=hidden, budget=budget, scores_per_hidden=rate)
    by_row = [[indices[index] for index in line] for line in lines]
    pays = sharing_pays(rows, by_row, hidden=hidden)
    return lines if pays else [[index] for index in range(len(indices))]


def inverse_index(positions: Tensor, count: int) -> Tensor:
    """(count,) the index in ``positions`` of each of ``count`` rows; -1 for a row that is not among them."""
    indices = torch.full((count,), -1)
    indices[positions] = torch.arange(len(positions))
    return indices


# rows of examples -------------------------------------------------------------------------------------------


def example_micro_batches(
    trained: TrainedModel, rows: TokenRows, sides: int, *, share: bool, build_rows: RowBuilder = build_rows
) -> tuple[MicroBatches, bool]:
    """Micro-batches of all rows with an example's rows together, and whether the rows of a pair share their
    prompt.

    sides: rows per example. Row i of ``rows`` belongs to example i modulo the number of examples. In a
    micro-batch the first rows of all its examples come before the second ones.
    """
    count = len(rows) // sides
    if count * sides != len(rows):
        raise ValueError(f"{len(rows)} rows cannot be examples of {sides} rows each")
    sizes = _sizes(rows, sides, trained.layout)
    shared_sizes = _shared_sizes(rows) if sides == 2 else []
    shared = share and sides == 2 and sum(shared_sizes) < _SHARE_BELOW * sum(sizes)
    if shared and trained.layout == "padded" and trained.device.type != "cpu":
        pairs = [(pair, count + pair) for pair in range(count)]
        shared = sharing_pays(rows, pairs, hidden=trained.model.config.hidden_size)

    sizes = shared_sizes if shared else sizes
    budget = trained.settings.tokens_per_micro_batch
    planned = plan(sizes, budget, layout=trained.layout, ranks=trained.world_size)[trained.rank]

    def build_examples(examples: list[int]) -> MicroBatch:
        positions = [side * count + example for side in range(sides) for example in examples]
        if shared and examples:
            pairs = [(example, count + example) for example in examples]
            build = build_packed_lines if trained.layout == "packed" else build_shared
            return build(rows, pairs, order=positions, device=trained.device)
        return build_rows(trained, rows, positions)

    return MicroBatches(planned or [[]], build_examples), shared


def tokens_read(rows: TokenRows, *, shared: bool) -> int:
    """Tokens of all rows, prompts included. shared: rows are pairs whose prompts are read once."""
    if shared:
        return sum(_shared_sizes(rows))
    return sum(map(len, rows.prompts)) + sum(map(len, rows.completions))


def _sizes(rows: TokenRows, sides: int, layout: str) -> list[int]:
    """Tokens that each example takes in a micro-batch; if padded, all its rows are as long as the longest."""
    count = len(rows) // sides
    texts = zip(rows.prompts, rows.completions, strict=True)
    lengths = [len(prompt) + len(completion) for prompt, completion in texts]
    by_example = [[lengths[side * count + example] for side in range(sides)] for example in range(count)]
    return [sum(sizes) if layout == "packed" else sides * max(sizes) for sizes in by_example]


def _shared_sizes(rows: TokenRows) -> list[int]:
    """Tokens of each pair, its prompt counted once."""
    count = len(rows) // 2
    completions = [len(completion) for completion in rows.completions]
    return [len(rows.prompts[pair]) + completions[pair] + completions[count + pair] for pair in range(count)]
