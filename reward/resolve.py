"""From a reward's name to something that grades: ``Grader(inputs) -> list[Score]``, one per completion, or an error that says why."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import ModuleType, TracebackType
from typing import Any, Literal

from reward import MODULES
from reward.score import RewardInputs, Score, is_float32
from reward.source import is_user_spec


@dataclass(frozen=True)
class RewardCall:
    """One entry of a recipe's ``reward.functions``: a registered name or ``path/to/file.py:function``."""

    name: str
    weight: float
    hp: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The name in metrics and messages: the function's, without the path of its file."""
        return self.name.rpartition(":")[2]


@dataclass(frozen=True)
class Grader:
    """A reward function with its hyperparameters in place, whose answer is checked."""

    label: str
    scope: Literal["completion", "group"]
    function: Callable[[RewardInputs], Any]
    warm_up: Callable[[], None]
    reads_ids: bool = False  # whether it reads the token ids of completions

    def __call__(self, inputs: RewardInputs) -> list[Score]:
        return checked(self.function(inputs), len(inputs.completions), self.label)


class ContractError(ValueError):
    """A reward function does not return what every one must: one score per completion. No other completion would help."""


class Caught:
    """Whatever somebody else's code raises inside the block, SystemExit included, as ``error``.

    The only place that accepts every exception: a user's grader may raise anything, and its failure has to become data.
    """

    error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return not isinstance(error, KeyboardInterrupt)

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


def resolve(call: RewardCall) -> Grader:
    """The grader of ``call``. Raises ValueError on an unknown name, a file that does not load, or hyperparameters it does not take."""
    from reward.user import load_user_function  # user.py needs Caught

    if is_user_spec(call.name):
        function = load_user_function(call.name, call.hp)
        return Grader(call.label, function.scope, function, _nothing, function.reads_ids)
    known: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        declared = {value.reward_name: value for value in vars(module).values() if hasattr(value, "reward_name")}
        if call.name in declared:
            function = declared[call.name]
            bound = functools.partial(function, **call.hp)
            return Grader(call.name, function.reward_scope, bound, _warm_up_of(module))
        known += declared
    raise ValueError(f"no reward is called {call.name!r}; choose from {', '.join(sorted(known))}, or name a path/to/file.py:function")


def checked(answer: Any, expected: int, label: str) -> list[Score]:
    """What a grader returned, as Scores.

    Raises ContractError where it is no list or of another length, ValueError on an item that is no score.
    """
    remedy = "return one score for each completion, in their order, and None for one that cannot be judged"
    if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
        raise ContractError(f"{label} must return a list of {expected} scores, got {type(answer).__name__}: {answer!r:.200}; {remedy}")
    scores = [as_score(item, label) for item in answer]
    if len(scores) != expected:
        raise ContractError(f"{label} returned {len(scores)} scores for {expected} completions; {remedy}")
    return scores


def as_score(item: Any, label: str) -> Score:
    """A Score, number or None as a Score of plain floats. None is ungraded "none"; what float32 cannot hold is ungraded "nan"."""
    if item is None:
        return Score(0.0, ungraded="none")
    score = item if isinstance(item, Score) else Score(item)
    if score.ungraded is not None:
        return Score(0.0, ungraded=str(score.ungraded), why=None if score.why is None else str(score.why)[:1000])
    value = _number(score.value)
    if value is None:
        raise ValueError(f"{label} must return floats, Scores or None, got {type(score.value).__name__}: {score.value!r:.200}")
    parts = {str(name): _number(part) for name, part in score.parts.items()}
    for name, part in {"the score": value, **parts}.items():
        if part is None:
            raise ValueError(f"{label}: the part {name!r} must be a number, got {score.parts[name]!r:.200}")
        if not is_float32(part):
            return Score(0.0, ungraded="nan", why=f"{name} is {part}, which is no finite float32 number")
    numbers = {name: part for name, part in parts.items() if part is not None}
    extra = {str(name): str(text) for name, text in score.extra.items()}
    return Score(value, numbers, answer=None if score.answer is None else str(score.answer), extra=extra)


def _number(value: Any) -> float | None:
    """As a float; infinity where it is an integer beyond all floats, None where it is no number."""
    if not isinstance(value, Real) and hasattr(value, "item"):
        with Caught():
            value = value.item()  # of numpy or torch
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _warm_up_of(module: ModuleType) -> Callable[[], None]:
    return vars(module).get("warm_up", _nothing)


def _nothing() -> None:
    """Most graders have no tables to build."""
