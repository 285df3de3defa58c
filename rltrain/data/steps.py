"""Finds the ends of a completion's steps: from its lines, from a pattern that begins a step, or from a list.

Positions count characters of the text decoded from the completion's token ids. A separator belongs to the
step that it ends, and a token that extends across an end belongs to the step that ends in it, as in
``rollout/steps.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["ends_of_lines", "ends_of_listed_steps", "ends_of_pattern", "step_of_tokens"]


def ends_of_lines(text: str) -> list[int]:
    """Ends of the steps if each non-blank line is a step; blank lines belong to the step before them."""
    return ends_of_pattern(text, re.compile(r"(?<=\n)[^\S\n]*(?=\S)"))


def ends_of_pattern(text: str, begins: re.Pattern[str]) -> list[int]:
    """Ends of the steps if each match of the pattern begins a step; text before the first match is a step
    unless it is blank.
    """
    starts = [match.start() for match in begins.finditer(text) if text[: match.start()].strip()]
    return [*starts, len(text)]


def ends_of_listed_steps(text: str, steps: Sequence[str]) -> list[int]:
    """Ends of the listed steps; each step ends where the next one begins.

    Raises ValueError if ``text`` does not contain the steps in this order.
    """
    starts = []
    position = 0
    for number, step in enumerate(steps):
        start = text.find(step.strip(), position)
        if start < 0 or not step.strip():
            problem = (
                "is empty"
                if not step.strip()
                else f"{step.strip()[:60]!r} is not in the completion after the one before"
            )
            raise ValueError(
                f"step {number} {problem}; list the steps with the same text and in the same order as in the "
                "completion"
            )
        starts.append(start)
        position = start + len(step.strip())

    if not starts:
        raise ValueError("the list of steps is empty; at least one step is needed")
    return [*starts[1:], len(text)]


def step_of_tokens(
    token_ids: Sequence[int], ends: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """The step number of each token, from 0. decode: turns token ids into text and may omit special tokens.

    A step that lies inside the last token of the previous step has no token. Tokens after the text (an EOS)
    belong to the last step.
    """
    numbers = [len(ends) - 1] * len(token_ids)
    begin = 0

    for step, end in enumerate(ends[:-1]):
        low = begin
        high = len(token_ids)
        while low < high:  # find the fewest tokens that decode to the text up to ``end``
            middle = (low + high) // 2
            low, high = (low, middle) if len(decode(token_ids[:middle])) >= end else (middle + 1, high)
        numbers[begin:low] = [step] * (low - begin)
        begin = low
    return numbers
