"""Resolves a reward's name to a grader, ``Grader(inputs) -> list[Score]`` with one score per completion, or
an error that says why.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from rltrain.reward import MODULES
from rltrain.reward.installed import installed_modules_of
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.score_checks import check_scores
from rltrain.reward.source import is_user_spec
from rltrain.reward.user import load_user_function


@dataclass(frozen=True)
class RewardCall:
    """One entry of a recipe's ``reward.functions``: a registered name or ``path/to/file.py:function``."""

    name: str
    weight: float
    hp: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The name in metrics and messages: the function's name without its file's path."""
        return self.name.rpartition(":")[2]


@dataclass(frozen=True)
class Grader:
    """A reward function bound to its hyperparameters; checks the function's answer."""

    label: str
    scope: Literal["completion", "group"]
    function: Callable[[RewardInputs], Any]
    warm_up: Callable[[], None]
    reads_ids: bool = False  # whether it reads the token ids of completions

    def __call__(self, inputs: RewardInputs) -> list[Score]:
        return check_scores(self.function(inputs), len(inputs.completions), self.label)


def resolve(call: RewardCall) -> Grader:
    """The grader for ``call``.

    Raises ValueError on an unknown name, a file that does not load, or hyperparameters that the function does
    not take.
    """
    if is_user_spec(call.name):
        function = load_user_function(call.name, call.hp)
        return Grader(call.label, function.scope, function, _do_nothing, function.reads_ids)
    known: list[str] = []
    for name in (*MODULES, *(entry.module for entry in installed_modules_of("reward"))):
        module = importlib.import_module(name)
        declared = {
            value.reward_name: value for value in vars(module).values() if hasattr(value, "reward_name")
        }
        if call.name in declared:
            function = declared[call.name]
            bound = functools.partial(function, **call.hp)
            return Grader(call.name, function.reward_scope, bound, _warm_up_of(module))
        known += declared
    raise ValueError(
        f"no reward is called {call.name!r}; choose from {', '.join(sorted(known))}, or name a "
        "path/to/file.py:function"
    )


def _warm_up_of(module: ModuleType) -> Callable[[], None]:
    return vars(module).get("warm_up", _do_nothing)


def _do_nothing() -> None:
    """Most graders have no tables to build."""
