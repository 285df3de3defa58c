"""A reward function as verl calls it, once per completion:

    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **hp) -> float | dict

``data_source`` and ``extra_info`` are the row's columns ("" and {} without one). ``ground_truth``
is the row's column of that name, else ``reward_model["ground_truth"]`` as in verl's files, else ``answer``. A
dict has the reward under "score"; its other numbers are logged as parts, its texts stand in the transcripts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.reward.score import RewardInputs, Score

__all__ = ["VerlFunction", "is_verl_form"]

_SCORE = "score"


def is_verl_form(function: Callable[..., Any]) -> bool:
    return "solution_str" in inspect.signature(function).parameters


@dataclass(frozen=True)
class VerlFunction:
    """``function`` as f(inputs)."""

    function: Callable[..., Any]
    hp: Mapping[str, Any]

    def __call__(self, inputs: RewardInputs) -> list[Score | float | None]:
        return [self._score(inputs, completion) for completion in inputs.completions]

    def _score(self, inputs: RewardInputs, completion: str) -> Score | float | None:
        columns = inputs.columns
        answer = self.function(
            data_source=columns.get("data_source", ""),
            solution_str=completion,
            ground_truth=copy.deepcopy(_ground_truth(columns)),
            extra_info=copy.deepcopy(columns.get("extra_info", {})),
            **self.hp,
        )
        return _as_score(answer) if isinstance(answer, Mapping) else answer


def _ground_truth(columns: Mapping[str, Any]) -> Any:
    """Raises ValueError if no column has it."""
    if "ground_truth" in columns:
        return columns["ground_truth"]
    nested = columns.get("reward_model")
    if isinstance(nested, Mapping) and "ground_truth" in nested:
        return nested["ground_truth"]
    if "answer" in columns:
        return columns["answer"]
    names = ", ".join(sorted(columns)) or "none"
    raise ValueError(
        "compute_score needs a ground truth, and the row has no column ground_truth, reward_model or answer; "
        f"its columns are: {names}. Map one with data.columns"
    )


def _as_score(answer: Mapping[str, Any]) -> Score:
    """Raises ValueError if the reward is missing or no number."""
    value = answer.get(_SCORE)
    if not isinstance(value, int | float):
        raise ValueError(f"compute_score returned a dict without a number under 'score': {dict(answer)!r}")
    others = {str(key): item for key, item in answer.items() if key != _SCORE}
    parts = {key: float(item) for key, item in others.items() if isinstance(item, int | float)}
    extra = {key: item for key, item in others.items() if isinstance(item, str)}
    return Score(float(value), parts, extra=extra)
