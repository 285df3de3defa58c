"""Which completions are correct, where the only reward is a user's function that returns 0 and 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rltrain.config.rules.rewards import is_user_function
from rltrain.config.schema import RewardRef
from rltrain.reward.score import Score
from rltrain.types.samples import ScoredGroup

__all__ = ["add_verdicts", "label_of_only_function", "why_unknown"]


def label_of_only_function(functions: Sequence[RewardRef]) -> str | None:
    """The label of the only reward if it is a user's function; None if it is not, or if there are more."""
    if len(functions) != 1 or not is_user_function(functions[0].name):
        return None
    return functions[0].name.rpartition(":")[2]


def add_verdicts(groups: Sequence[ScoredGroup], label: str | None) -> list[ScoredGroup]:
    """Adds a part ``correct`` to every score, where every value of the function ``label`` is 0 or 1.

    If a single value is another number, or the function reports correctness itself, the groups stay as they
    are.
    """
    values = _values(groups, label)
    if label is None or not values or not set(values) <= {0.0, 1.0} or _reports_correctness(groups):
        return list(groups)
    return [
        dataclasses.replace(group, scores=tuple(_add_verdict(score, label) for score in group.scores))
        for group in groups
    ]


def why_unknown(groups: Sequence[ScoredGroup], label: str | None) -> str:
    """The reason why ``groups`` have no pass@k, in words."""
    remedy = 'return Score(value, {"correct": 1.0}) (or 0.0) for each completion'
    others = [value for value in _values(groups, label) if value not in (0.0, 1.0)]
    if label is not None and others:
        return (
            f"no pass@k: {label} does not say which completions are correct, and returns other values than 0 "
            f"and 1 (for example {others[0]:g}); {remedy}"
        )
    return f"no pass@k: the rewards do not say of every completion whether it is correct; {remedy}"


def _values(groups: Sequence[ScoredGroup], label: str | None) -> list[float]:
    scores = [score for group in groups for score in group.scores if score.ungraded is None]
    return [score.parts[label] for score in scores if label in score.parts] if label is not None else []


def _reports_correctness(groups: Sequence[ScoredGroup]) -> bool:
    return any(score.correct is not None for group in groups for score in group.scores)


def _add_verdict(score: Score, label: str) -> Score:
    if score.ungraded is not None:
        return score
    return dataclasses.replace(score, parts={**score.parts, "correct": score.parts[label]})
