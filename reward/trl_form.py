"""A reward function as TRL's GRPOTrainer calls it: keywords, a list of rewards, and two functions to log
with.

``prompts`` and ``completions`` are texts; if the data's prompt is a list of messages, they are lists of
messages, each completion being one assistant message. ``completion_ids`` are lists of token ids. Every other
column of the row is a list with one entry per completion. ``trainer_state`` has only ``global_step``.

``log_metric(name, value)`` adds a part to the scores, which is logged as a mean; ``log_extra(column,
values)`` adds a text to each completion in the transcripts.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.reward.score import RewardInputs
from rltrain.reward.score_checks import check_scores

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LONGEST_EXTRA = 10_000  # characters


@dataclass(frozen=True)
class TrainerState:
    """The run's progress. The other attributes of transformers.TrainerState do not exist here."""

    global_step: int  # optimizer updates of the policy that generated the completions

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has global_step and nothing else here, no {name}")


@dataclass(frozen=True)
class TrlFunction:
    """``function`` as f(inputs); without ``**columns`` it gets only the columns that it names."""

    function: Callable[..., Any]
    hp: Mapping[str, Any]

    @property
    def reads_ids(self) -> bool:
        """Whether the function names ``completion_ids`` or takes every keyword."""
        parameters = inspect.signature(self.function).parameters
        return "completion_ids" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def __call__(self, inputs: RewardInputs) -> Any:
        """Raises ValueError if the function names a column that the row does not have."""
        log = _Log(len(inputs.completions))
        values: dict[str, Any] = {
            **_trl_keywords(inputs),
            "log_metric": log.add_metric,
            "log_extra": log.add_extra,
            **self.hp,
        }
        parameters = inspect.signature(self.function).parameters
        named = {key: parameter for key, parameter in parameters.items() if parameter.kind in _NAMED}
        missing = [
            key
            for key, parameter in named.items()
            if parameter.default is parameter.empty and key not in values
        ]
        if missing:
            columns = ", ".join(sorted(inputs.columns)) or "none"
            raise ValueError(
                f"{self.function.__name__} needs {', '.join(missing)}, but the row has no such column; its "
                f"columns are: {columns}"
            )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            values = {key: value for key, value in values.items() if key in named}
        return log.attach_to(self.function(**values), self.function.__name__)


def _trl_keywords(inputs: RewardInputs) -> dict[str, Any]:
    """The keywords that TRL passes to every function. Each completion has its own copy of every column."""
    count = len(inputs.completions)
    columns = {name: [copy.deepcopy(value) for _ in range(count)] for name, value in inputs.columns.items()}
    is_conversational = inputs.messages is not None
    prompts: list[Any] = [
        _copy_messages(inputs.messages) if inputs.messages is not None else inputs.prompt
        for _ in range(count)
    ]
    completions = [
        [{"role": "assistant", "content": text}] if is_conversational else text for text in inputs.completions
    ]
    return {
        **columns,
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [list(ids) for ids in inputs.completion_ids],
        "trainer_state": TrainerState(inputs.updates),
    }


def _copy_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [copy.deepcopy(dict(message)) for message in messages]


class _Log:
    """The metrics and texts that a function logs in one call."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._metrics: dict[str, list[float]] = {}
        self._extra: dict[str, list[str]] = {}

    def add_metric(self, name: str, value: float) -> None:
        """Averages several values of one name, without those that are not finite."""
        if name == "correct" or name.endswith("/correct"):
            raise ValueError(
                f"log_metric: {name!r} names verdicts on completions; return Score(value, {{'correct': "
                "1.0}) for each"
            )
        if math.isfinite(value):
            self._metrics.setdefault(str(name), []).append(float(value))

    def add_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self._count:
            raise ValueError(
                f"log_extra: {column!r} has {len(values)} values for {self._count} completions; give one for "
                "each"
            )
        self._extra[str(column)] = [str(value)[:_LONGEST_EXTRA] for value in values]

    def attach_to(self, answer: Any, label: str) -> Any:
        """``answer`` with the logged metrics and texts, or unchanged if nothing was logged."""
        if not self._metrics and not self._extra:
            return answer
        means = {name: math.fsum(values) / len(values) for name, values in self._metrics.items()}
        extras = [
            {column: values[row] for column, values in self._extra.items()} for row in range(self._count)
        ]
        return [
            dataclasses.replace(score, parts={**score.parts, **means}, extra={**score.extra, **extra})
            for score, extra in zip(check_scores(answer, self._count, label), extras, strict=True)
        ]
