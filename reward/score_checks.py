"""Checks the return value of a reward function and converts it to scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from rltrain.reward.caught import Caught
from rltrain.reward.score import Score, is_float32


class ContractError(ValueError):
    """A reward function does not return one score per completion: other completions would fail as well."""


def check_scores(answer: Any, expected: int, label: str) -> list[Score]:
    """A grader's return value as Scores.

    Raises ContractError if it is not a list of the expected length, ValueError on an item that is not a
    score.
    """
    remedy = "return one score for each completion, in their order, and None for one that cannot be judged"
    if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
        raise ContractError(
            f"{label} must return a list of {expected} scores, got {type(answer).__name__}: {answer!r:.200}; "
            f"{remedy}"
        )
    scores = [as_score(item, label) for item in answer]
    if len(scores) != expected:
        raise ContractError(f"{label} returned {len(scores)} scores for {expected} completions; {remedy}")
    return scores


def as_score(item: Any, label: str) -> Score:
    """A Score, number or None as a Score of plain floats.

    None becomes ungraded "none"; a number that float32 cannot hold becomes ungraded "nan".
    """
    if item is None:
        return Score(0.0, ungraded="none")
    score = item if isinstance(item, Score) else Score(item)
    if score.ungraded is not None:
        return Score(
            0.0, ungraded=str(score.ungraded), why=None if score.why is None else str(score.why)[:1000]
        )
    value = _to_float(score.value)
    if value is None:
        raise ValueError(
            f"{label} must return floats, Scores or None, got {type(score.value).__name__}: "
            f"{score.value!r:.200}"
        )
    parts = {str(name): _to_float(part) for name, part in score.parts.items()}
    for name, part in {"the score": value, **parts}.items():
        if part is None:
            raise ValueError(f"{label}: the part {name!r} must be a number, got {score.parts[name]!r:.200}")
        if not is_float32(part):
            return Score(0.0, ungraded="nan", why=f"{name} is {part}, which is not a finite float32 number")
    numbers = {name: part for name, part in parts.items() if part is not None}
    extra = {str(name): str(text) for name, text in score.extra.items()}
    return Score(value, numbers, answer=None if score.answer is None else str(score.answer), extra=extra)


def _to_float(value: Any) -> float | None:
    """``value`` as a float; infinity for an integer beyond the range of floats, None if it is not a
    number."""
    if not isinstance(value, Real) and hasattr(value, "item"):
        with Caught():
            value = value.item()  # a scalar of numpy or torch
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
