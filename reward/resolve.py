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
from reward.score import RewardInputs, Score
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

    def __call__(self, inputs: RewardInputs) -> list[Score]:
        return checked(self.function(inputs), len(inputs.completions), self.label)


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
        return Grader(call.label, getattr(function, "reward_scope", "completion"), function, _nothing)
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
    """What a grader returned, as Scores. Raises ValueError on a wrong number of scores or on something that is no score."""
    if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
        raise ValueError(f"{label} must return a list of {expected} scores, got {type(answer).__name__}: {answer!r:.200}")
    scores = [as_score(item, label) for item in answer]
    if len(scores) != expected:
        raise ValueError(f"{label} returned {len(scores)} scores for {expected} completions; return one for each, in their order")
    return scores


def as_score(item: Any, label: str) -> Score:
    """A Score, number or None as a Score of plain floats. None is ungraded "none"; NaN and infinity are ungraded "nan"."""
    if item is None:
        return Score(0.0, ungraded="none")
    given = item if isinstance(item, Score) else Score(item)
    if given.ungraded is not None:
        return Score(0.0, ungraded=str(given.ungraded), why=None if given.why is None else str(given.why)[:1000])
    if not isinstance(given.value, Real):
        raise ValueError(f"{label} must return floats, Scores or None, got {type(given.value).__name__}: {given.value!r:.200}")
    if not math.isfinite(given.value):
        return Score(0.0, ungraded="nan")
    parts = {str(name): float(part) for name, part in given.parts.items()}
    return Score(float(given.value), parts, answer=None if given.answer is None else str(given.answer))


def _warm_up_of(module: ModuleType) -> Callable[[], None]:
    return vars(module).get("warm_up", _nothing)


def _nothing() -> None:
    """Most graders have no tables to build."""
