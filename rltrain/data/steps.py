"""Where the steps of a completion end: at its lines, where a pattern begins one, or as somebody lists them.

Positions are characters of the completion's text as its token ids spell it. A separator belongs to the step
that it ends, and a token that reaches over an end to the step that ends in it, as ``rollout/steps.py`` has
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["ends_of_lines", "ends_of_listed_steps", "ends_of_pattern", "step_of_tokens"]


def ends_of_lines(text: str) -> list[int]:
    """Each line with text in it is a step; empty lines belong to the one before."""
    return ends_of_pattern(text, re.compile(r"(?<=\n)[^\S\n]*(?=\S)"))


def ends_of_pattern(text: str, begins: re.Pattern[str]) -> list[int]:
    """A step begins wherever the pattern matches; what is before the first match is a step if it is
    not blank.
    """
    starts = [match.start() for match in begins.finditer(text) if text[: match.start()].strip()]
    return [*starts, len(text)]


def ends_of_listed_steps(text: str, steps: Sequence[str]) -> list[int]:
    """Each step ends where the next one begins.

    Raises ValueError where ``text`` does not have them in this order.
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
            raise ValueError(f"step {number} {problem}; list the steps as they stand in it, in their order")
        starts.append(start)
        position = start + len(step.strip())
    if not starts:
        raise ValueError("the list of steps is empty; at least one step is needed")
    return [*starts[1:], len(text)]


def step_of_tokens(
    token_ids: Sequence[int], ends: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """For each token the number of its step, from 0. decode: token ids to text; it may leave special tokens
    out.

    A step whose text lies within the last token of the step before has no token. What comes after the text
    (an EOS) belongs to the last step.
    """
    numbers = [len(ends) - 1] * len(token_ids)
    begin = 0
    for step, end in enumerate(ends[:-1]):
        low = begin
        high = len(token_ids)
        while low < high:  # the fewest tokens that spell the text up to ``end``
            middle = (low + high) // 2
            low, high = (low, middle) if len(decode(token_ids[:middle])) >= end else (middle + 1, high)
        numbers[begin:low] = [step] * (low - begin)
        begin = low
    return numbers
