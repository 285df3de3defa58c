"""A prompt read once for its completions: one line holds the prompt, then the completions, which do not see
each other.

Every position takes part in attention with the prompt and its own completion only, by a mask, and each
completion's positions go on where the prompt ended, so that every token gets the log-prob it would have
alone. Read are P + sum C tokens instead of n P + sum C, and completions of different lengths leave no padding
between them. What it costs is attention over the whole line, most of it masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rltrain.learner.packing import MicroBatch, ramp
from rltrain.types.policy import TokenRows

__all__ = ["build_shared", "line_length", "lines_of"]

_WORTH_SHARING = 0.8  # of the positions that plain rows would read: masked attention has a price
_MASK_ELEMENTS = 1 << 26  # of a micro-batch's mask, at most
_SCORES_PER_HIDDEN = (
    6  # a layer's matrix products cost a position about 24 H^2, one of its attention scores 4 H
)


def lines_of(rows: TokenRows, positions: Sequence[int], *, hidden: int, budget: int) -> list[list[int]]:
    """The rows at ``positions``, as indices into it, in lines to read together: those of one prompt, or each
    by itself where sharing saves little.

    hidden: width H of the model. budget: tokens that one micro-batch may read. m completions of C tokens in a
    line cost ``6 H (P / m + C) + (P + m C)^2 / m`` each, in attention scores: least at ``m = sqrt(P (6 H +
    P)) / C``.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, position in enumerate(positions):
        groups.setdefault(rows.prompts[position], []).append(index)
    apart = [[index] for index in range(len(positions))]
    longest = min(
        budget, max(_MASK_ELEMENTS // budget, 1)
    )  # then even a full micro-batch's mask, lines x longest^2, is within bounds
    lines: list[list[int]] = []
    for prompt, members in groups.items():
        read = {index: max(len(rows.completions[positions[index]]) - 1, 0) for index in members}
        best = (
            math.sqrt(len(prompt) * (_SCORES_PER_HIDDEN * hidden + len(prompt)))
            * len(members)
            / max(sum(read.values()), 1)
        )
        lines += _spread(read, len(prompt), max(best, 1.0), longest)
    together = sum(line_length(rows, [positions[index] for index in line]) for line in lines)
    return (
        lines
        if together <= _WORTH_SHARING * sum(line_length(rows, [position]) for position in positions)
        else apart
    )


def _spread(read: dict[int, int], prompt: int, together: float, longest: int) -> list[list[int]]:
    """The rows ``read`` (index: tokens) in about equally long lines of ``together`` rows on average, none
    longer than ``longest`` unless it is a single row."""
    order = sorted(read, key=lambda index: (-read[index], index))
    count = max(round(len(order) / together), 1)
    while True:
        lines: list[list[int]] = [[] for _ in range(count)]
        filled = [prompt] * count
        for index in order:  # each, longest first, to the emptiest line
            at = filled.index(min(filled))
            lines[at].append(index)
            filled[at] += read[index]
        if count == len(order) or max(filled) <= longest:
            return [sorted(line) for line in lines if line]
        count = min(count + max(count // 4, 1), len(order))


def line_length(rows: TokenRows, line: Sequence[int]) -> int:
    """Tokens read for the rows ``line`` of one prompt.

    The last token of a completion predicts nothing and is not read.
    """
    return len(rows.prompts[line[0]]) + sum(max(len(rows.completions[row]) - 1, 0) for row in line)


def build_shared(
    rows: TokenRows,
    lines: Sequence[Sequence[int]],
    *,
    order: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """The micro-batch of ``lines``, each of rows of one prompt; its r rows come in ``order``, or as the lines
    have them.

    Raises ValueError where rows of a line have different prompts, or an empty one.
    """
    count, longest = len(lines), max(line_length(rows, line) for line in lines)
    ids, positions = np.zeros((2, count, longest), np.int64)
    owner = np.full(
        (count, longest), -1
    )  # of each position: 0 the prompt, i the line's i-th row; behind the last there is none
    starts: dict[
        int, tuple[int, int]
    ] = {}  # of each row, among all positions: the prompt's last, and its own first
    for number, line in enumerate(lines):
        for mine, row, tokens, begin in _laid(rows, line):
            here, before = slice(begin, begin + len(tokens)), len(rows.prompts[line[0]])
            ids[number, here], owner[number, here] = tokens, mine
            positions[number, here] = np.arange(len(tokens)) + (before if mine else 0)
            starts[row] = (number * longest + before - 1, number * longest + begin)
    order = [row for line in lines for row in line] if order is None else order
    after = np.array([len(rows.completions[row]) for row in order], np.int64)
    place, column = np.repeat(np.arange(len(order)), after), ramp(after)
    of_prompt, own = np.array([starts[row] for row in order], np.int64).T
    arrays = {
        "rows": np.asarray(order, np.int64),
        "input_ids": ids,
        "position_ids": positions,
        # The prompt's last token predicts the first of every completion.
        "index": np.where(column == 0, of_prompt[place], own[place] + column - 1),
        "targets": np.fromiter(
            (token for row in order for token in rows.completions[row]), np.int64, int(after.sum())
        ),
        "row": place,
        "column": column,
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mask = _mask(torch.from_numpy(owner).to(device))
    width = max(int(after.max()), 1)
    return MicroBatch(**tensors, attention_mask=mask, width=width, packed=False).to(device)


def _laid(rows: TokenRows, line: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...], int]]:
    """(0, row, prompt, 0), then for every row (its number in the line from 1, row, tokens read, where
    they begin).
    """
    prompt = rows.prompts[line[0]]
    if not prompt:
        raise ValueError(
            f"row {line[0]} has an empty prompt: nothing predicts its first token; start the prompt with a "
            "BOS token"
        )
    yield 0, line[0], prompt, 0
    begin = len(prompt)
    for mine, row in enumerate(line, 1):
        if rows.prompts[row] != prompt:
            raise ValueError(f"rows {line[0]} and {row} have different prompts, so they cannot share one")
        tokens = rows.completions[row][:-1]
        yield mine, row, tokens, begin
        begin += len(tokens)


def _mask(owner: torch.Tensor) -> torch.Tensor:
    """(lines, 1, L, L) bool: what each position looks at: the prompt and its own completion, up to itself."""
    longest = owner.shape[1]
    looks = (owner[:, :, None] == owner[:, None, :]).logical_or_(owner[:, None, :] == 0)
    return looks.logical_and_(torch.ones(longest, longest, dtype=torch.bool, device=owner.device).tril_())[
        :, None
    ]
