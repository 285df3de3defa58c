"""Which completions are correct, where the only reward is a user's function and gives 0 and 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from reward.score import Score
from rltrain.config.rules.rewards import is_user_function
from rltrain.config.schema import RewardRef
from rltrain.types.samples import ScoredGroup

__all__ = ["label_of_only_function", "why_unknown", "with_verdicts"]


def label_of_only_function(functions: Sequence[RewardRef]) -> str | None:
    """The label of the user's function that is the only reward; None where there are others, or it is
    none of the user's.
    """
    if len(functions) != 1 or not is_user_function(functions[0].name):
        return None
    return functions[0].name.rpartition(":")[2]


def with_verdicts(groups: Sequence[ScoredGroup], label: str | None) -> list[ScoredGroup]:
    """``groups`` with a part ``correct`` in every score, where all that the function ``label`` gave in them
    is 0 or 1.

    One other value, or a verdict of the function's own, leaves them as they are.
    """
    values = _values(groups, label)
    if label is None or not values or not set(values) <= {0.0, 1.0} or _says_itself(groups):
        return list(groups)
    return [
        dataclasses.replace(group, scores=tuple(_judged(score, label) for score in group.scores))
        for group in groups
    ]


def why_unknown(groups: Sequence[ScoredGroup], label: str | None) -> str:
    """In words, why there is no pass@k of ``groups``."""
    remedy = 'return Score(value, {"correct": 1.0}) (or 0.0) for each completion'
    others = [value for value in _values(groups, label) if value not in (0.0, 1.0)]
    if label is not None and others:
        return (
            f"no pass@k: {label} says of no completion whether it is correct, and gives more than 0 and 1 "
            f"(for example {others[0]:g}); {remedy}"
        )
    return f"no pass@k: the rewards do not say of every completion whether it is correct; {remedy}"


def _values(groups: Sequence[ScoredGroup], label: str | None) -> list[float]:
    scores = [score for group in groups for score in group.scores if score.ungraded is None]
    return [score.parts[label] for score in scores if label in score.parts] if label is not None else []


def _says_itself(groups: Sequence[ScoredGroup]) -> bool:
    return any(score.correct is not None for group in groups for score in group.scores)


def _judged(score: Score, label: str) -> Score:
    if score.ungraded is not None:
        return score
    return dataclasses.replace(score, parts={**score.parts, "correct": score.parts[label]})
