"""Which step of its trajectory a token belongs to: an assistant turn, or a line of a completion that
has no turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rltrain.types.samples import Completion

_BREAKS, _BLANK = 1, 2  # bits of what is kept of a token's text


class StepSplitter:
    """What tokens look like by themselves, as far as lines go, each decoded once in a run; completions are
    never tokenised again.

    decode: one token id to its text, nothing for a special token. A newline is one byte that is part of no
    other character, so a token holds one exactly if its own text does, however a character was cut in pieces.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._known: dict[int, int] = {}

    def marks(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``ids`` (any shape): bool, the token's text holds a newline; bool, it is blank."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        found = torch.tensor([self._mark(token) for token in unique.tolist()], dtype=torch.int64)[inverse]
        return (found & _BREAKS) > 0, (found & _BLANK) > 0

    def _mark(self, token: int) -> int:
        if token not in self._known:
            text = self._decode([token])
            self._known[token] = _BREAKS * ("\n" in text) + _BLANK * (not text.strip())
        return self._known[token]


def step_ids(completions: Sequence[Completion], mask: Tensor, lines: StepSplitter | None) -> Tensor | None:
    """(B, T) int64 from 0 in each row, -1 where ``mask (B, T)`` is off. None where nothing says what a step
    is.

    A completion with turns has one step per turn. Of another, each non-empty line is a step, its line break
    included; empty lines and a final EOS belong to the line before. Without ``lines`` it is one step.
    """
    if lines is None and not any(completion.turns for completion in completions):
        return None
    cut = (
        _line_numbers(completions, mask, lines)
        if lines is not None
        else torch.zeros(mask.shape, dtype=torch.int64)
    )
    for row, completion in enumerate(completions):
        for number, (start, stop) in enumerate(completion.turns):
            cut[row, start:stop] = number
    return torch.where(mask, cut, -1)


def _line_numbers(completions: Sequence[Completion], mask: Tensor, lines: StepSplitter) -> Tensor:
    """(B, T) which non-empty line a token stands on.

    A token that opens with a line break and goes on counts to the line before.
    """
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    for row, completion in enumerate(completions):
        ids[row, : len(completion.token_ids)] = torch.tensor(completion.token_ids, dtype=torch.int64)
    breaks, blank = lines.marks(ids)
    seen = breaks.to(torch.int64).cumsum(1) - breaks.to(torch.int64)  # line breaks in the tokens before
    written = (
        torch.where(blank, -1, seen).cummax(1).values
    )  # of the last token with text so far: breaks before it
    before = torch.cat([torch.full_like(written[:, :1], -1), written[:, :-1]], dim=1)
    return (~blank & (before >= 0) & (seen > before)).to(torch.int64).cumsum(1)
