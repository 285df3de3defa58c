"""Which step of its trajectory a token belongs to. A step is an assistant turn, or a line of a completion
without turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rltrain.types.samples import Completion

# bits that describe a token's text: it contains a newline; it is blank
_BREAKS = 1
_BLANK = 2


class StepSplitter:
    """Knows which tokens contain a newline and which are blank. It decodes each token once in a run, and
    completions are never tokenised again.

    decode: a single token id to its text, empty for a special token. A newline is one byte that is part of no
    other character, so a token contains one exactly if its own text does, even where tokens divide a
    character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._known: dict[int, int] = {}

    def marks(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(the token's text contains a newline, it is blank): bool, in the shape of ``ids``."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        marks = torch.tensor([self._mark(token) for token in unique.tolist()], dtype=torch.int64)[inverse]
        return (marks & _BREAKS) > 0, (marks & _BLANK) > 0

    def _mark(self, token: int) -> int:
        if token not in self._known:
            text = self._decode([token])
            self._known[token] = _BREAKS * ("\n" in text) + _BLANK * (not text.strip())
        return self._known[token]


def step_ids(completions: Sequence[Completion], mask: Tensor, lines: StepSplitter | None) -> Tensor | None:
    """(B, T) int64 from 0 in each row, -1 where ``mask (B, T)`` is off. None where no completion has turns
    and ``lines`` is None.

    A completion with turns has one step per turn. In a completion without turns each non-empty line is a
    step, its line break included; empty lines and a final EOS belong to the line before. Where ``lines`` is
    None such a completion is a single step.
    """
    if lines is None and not any(completion.turns for completion in completions):
        return None
    if lines is not None:
        numbers = _line_numbers(completions, mask, lines)
    else:
        numbers = torch.zeros(mask.shape, dtype=torch.int64)
    for row, completion in enumerate(completions):
        for turn, (start, stop) in enumerate(completion.turns):
            numbers[row, start:stop] = turn
    return torch.where(mask, numbers, -1)


def _line_numbers(completions: Sequence[Completion], mask: Tensor, lines: StepSplitter) -> Tensor:
    """(B, T) the number of the non-empty line that a token is on.

    A token that begins with a line break and continues with text belongs to the line before.
    """
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    for row, completion in enumerate(completions):
        ids[row, : len(completion.token_ids)] = torch.tensor(completion.token_ids, dtype=torch.int64)
    breaks, blank = lines.marks(ids)
    breaks_before = breaks.to(torch.int64).cumsum(1) - breaks.to(torch.int64)
    # breaks before the last token with text, up to and including this token; -1 where there is none yet
    latest = torch.where(blank, -1, breaks_before).cummax(1).values
    previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    return (~blank & (previous >= 0) & (breaks_before > previous)).to(torch.int64).cumsum(1)
