"""Reads a prompt once for several completions: one line holds the prompt, then the completions, which do not
see each other.

A mask restricts the attention of every position to the prompt and its own completion, and each completion's
positions continue after the prompt's, so that every token gets the log-prob that it has in a line of its own.
The model reads P + sum C tokens instead of n P + sum C, and completions of different lengths need no padding
between them. The price is attention over the whole line, most of it masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from rltrain.learner.block_masks import Segment, block_mask
from rltrain.learner.packing import MicroBatch, ramp
from rltrain.types.policy import TokenRows

__all__ = ["build_packed_lines", "build_shared", "line_length", "lines_of", "packed_lines"]

# Prompts are shared if that reads at most this share of the positions of separate rows: masked attention is
# not free.
_WORTH_SHARING = 0.8
_MASK_ELEMENTS = 1 << 26  # of a micro-batch's mask, at most
# A layer's matrix products cost a position about 24 H^2, one of its attention scores 4 H.
_SCORES_PER_HIDDEN = 6


def lines_of(
    rows: TokenRows,
    positions: Sequence[int],
    *,
    hidden: int,
    budget: int,
    scores_per_hidden: float = _SCORES_PER_HIDDEN,
) -> list[list[int]]:
    """Indices into ``positions`` in lines of rows with one prompt, or one line for each row where sharing
    saves little.

    hidden: width H of the model. budget: tokens that one micro-batch may read. scores_per_hidden: the number
    a such that a position's matrix products take as long as a H attention scores; 6 where both run at one
    rate. Each of m completions of C tokens in a line costs ``a H (P / m + C) + (P + m C)^2 / m``, in units of
    one attention score; the minimum is at ``m = sqrt(P (a H + P)) / C``.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, position in enumerate(positions):
        groups.setdefault(rows.prompts[position], []).append(index)
    separate = [[index] for index in range(len(positions))]
    # With lines of this length even a full micro-batch's mask, lines x longest^2, is within bounds.
    longest = min(budget, max(_MASK_ELEMENTS // budget, 1))
    lines: list[list[int]] = []
    for prompt, members in groups.items():
        read = {index: max(len(rows.completions[positions[index]]) - 1, 0) for index in members}
        root = math.sqrt(len(prompt) * (scores_per_hidden * hidden + len(prompt)))
        rows_per_line = root * len(members) / max(sum(read.values()), 1)
        lines += _distribute(read, len(prompt), max(rows_per_line, 1.0), longest)

    shared_tokens = sum(line_length(rows, [positions[index] for index in line]) for line in lines)
    separate_tokens = sum(line_length(rows, [position]) for position in positions)
    return lines if shared_tokens <= _WORTH_SHARING * separate_tokens else separate


def packed_lines(rows: TokenRows, positions: Sequence[int], *, budget: int) -> list[list[int]]:
    """Indices into ``positions`` in lines of rows with one prompt, as long as ``budget`` tokens allow.

    For kernels that skip what a position does not attend to: sharing costs them nothing.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, position in enumerate(positions):
        groups.setdefault(rows.prompts[position], []).append(index)
    lines: list[list[int]] = []
    for prompt, members in groups.items():
        read = {index: max(len(rows.completions[positions[index]]) - 1, 0) for index in members}
        lines += _distribute(read, len(prompt), len(members), budget)
    return lines


def _distribute(read: dict[int, int], prompt: int, rows_per_line: float, longest: int) -> list[list[int]]:
    """The rows of ``read`` (index: tokens) in lines of about equal length with ``rows_per_line`` rows on
    average.

    prompt: tokens of the prompt. No line is longer than ``longest`` unless it has a single row.
    """
    order = sorted(read, key=lambda index: (-read[index], index))
    count = max(round(len(order) / rows_per_line), 1)
    while True:
        lines: list[list[int]] = [[] for _ in range(count)]
        filled = [prompt] * count
        for index in order:  # each, longest first, goes to the emptiest line
            line = filled.index(min(filled))
            lines[line].append(index)
            filled[line] += read[index]
        if count == len(order) or max(filled) <= longest:
            return [sorted(line) for line in lines if line]
        count = min(count + max(count // 4, 1), len(order))


def line_length(rows: TokenRows, line: Sequence[int]) -> int:
    """Tokens read for the rows ``line`` of one prompt, without the last token of each completion, which
    predicts nothing.
    """
    return len(rows.prompts[line[0]]) + sum(max(len(rows.completions[row]) - 1, 0) for row in line)


def build_shared(
    rows: TokenRows,
    lines: Sequence[Sequence[int]],
    *,
    order: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """The micro-batch of ``lines``, each of rows of one prompt.

    order: of the r rows in the micro-batch; None: that of the lines. Raises ValueError where rows of a line
    have different prompts, or an empty one.
    """
    count = len(lines)
    longest = max(line_length(rows, line) for line in lines)
    ids, positions = np.zeros((2, count, longest), np.int64)
    # The owner of each position: 0 the prompt, i the line's i-th row, -1 padding.
    owner = np.full((count, longest), -1)
    # By row, indices among all positions: of the prompt's last token, and of the completion's first token.
    starts: dict[int, tuple[int, int]] = {}
    for number, line in enumerate(lines):
        prompt_length = len(rows.prompts[line[0]])
        for owner_id, row, tokens, start in _segments(rows, line):
            segment = slice(start, start + len(tokens))
            ids[number, segment] = tokens
            owner[number, segment] = owner_id
            positions[number, segment] = np.arange(len(tokens)) + (prompt_length if owner_id else 0)
            starts[row] = (number * longest + prompt_length - 1, number * longest + start)

    order = [row for line in lines for row in line] if order is None else order
    tensors = _targets(rows, order, starts)
    tensors |= {"input_ids": torch.from_numpy(ids), "position_ids": torch.from_numpy(positions)}
    mask = _mask(torch.from_numpy(owner).to(device))
    width = max(max(len(rows.completions[row]) for row in order), 1)
    return MicroBatch(**tensors, attention_mask=mask, width=width, packed=False).to(device)


def build_packed_lines(
    rows: TokenRows,
    lines: Sequence[Sequence[int]],
    *,
    order: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """As ``build_shared``, with the lines one after the other in one sequence and a block-sparse mask."""
    ids: list[int] = []
    places: list[np.ndarray] = []
    segments: list[Segment] = []
    starts: dict[int, tuple[int, int]] = {}  # by row: its prompt's last position, its completion's first
    for line in lines:
        prompt_start = len(ids)
        prompt_stop = prompt_start + len(rows.prompts[line[0]])
        for owner_id, row, tokens, offset in _segments(rows, line):
            start = prompt_start + offset
            segments.append(Segment(start, start + len(tokens), prompt_start, prompt_stop))
            places.append(np.arange(len(tokens)) + (prompt_stop - prompt_start if owner_id else 0))
            ids += tokens
            if owner_id:
                starts[row] = (prompt_stop - 1, start)
    order = [row for line in lines for row in line] if order is None else order
    tensors = _targets(rows, order, starts)
    tensors |= {
        "input_ids": torch.tensor(ids)[None],
        "position_ids": torch.from_numpy(np.concatenate(places))[None],
    }
    width = max(max(len(rows.completions[row]) for row in order), 1)
    mask = block_mask(segments, device)
    return MicroBatch(**tensors, attention_mask=mask, width=width, packed=True).to(device)


def _targets(
    rows: TokenRows, order: Sequence[int], starts: Mapping[int, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """What of a micro-batch says where each completion token is predicted.

    starts: by row, the positions of the prompt's last token and of the completion's first.
    """
    after = np.array([len(rows.completions[row]) for row in order], np.int64)
    place = np.repeat(np.arange(len(order)), after)
    column = ramp(after)
    prompt_end, completion_start = np.array([starts[row] for row in order], np.int64).T
    targets = (token for row in order for token in rows.completions[row])
    arrays = {
        "rows": np.asarray(order, np.int64),
        # The prompt's last token predicts the first of every completion.
        "index": np.where(column == 0, prompt_end[place], completion_start[place] + column - 1),
        "targets": np.fromiter(targets, np.int64, int(after.sum())),
        "row": place,
        "column": column,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _segments(rows: TokenRows, line: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...], int]]:
    """The segments of a line: (0, first row, prompt, 0), then for every row (its number in the line from
    1, row, tokens read, start in the line).
    """
    prompt = rows.prompts[line[0]]
    if not prompt:
        raise ValueError(
            f"row {line[0]} has an empty prompt: nothing predicts its first token; start the prompt with a "
            "BOS token"
        )
    yield 0, line[0], prompt, 0
    start = len(prompt)
    for number, row in enumerate(line, 1):
        if rows.prompts[row] != prompt:
            raise ValueError(f"rows {line[0]} and {row} have different prompts, so they cannot share one")
        tokens = rows.completions[row][:-1]
        yield number, row, tokens, start
        start += len(tokens)


def _mask(owner: torch.Tensor) -> torch.Tensor:
    """(lines, 1, L, L) bool: each position attends to the prompt and its own completion, up to itself."""
    longest = owner.shape[1]
    attends = (owner[:, :, None] == owner[:, None, :]).logical_or_(owner[:, None, :] == 0)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=owner.device).tril_()
    return attends.logical_and_(causal)[:, None]
