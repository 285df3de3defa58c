"""Loads a user's reward, ``path/to/file.py:function``, by its path. The signature decides between two forms:

    def f(inputs: RewardInputs, **hp) -> list[Score | float | None]
    def f(completions, prompts, answer, **columns) -> list[float | None]

The second is TRL's (``reward/trl_form.py``). Either may be ``async def``. None leaves a completion ungraded.
``@reward("name", scope="group")`` above the first form declares that scores depend on one another.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rltrain.reward.score import RewardInputs
from rltrain.reward.source import import_file
from rltrain.reward.trl_form import TrlFunction

_FORMS = (
    "write f(inputs, **hp) -> list of Score, float or None; or TRL's f(completions, prompts, **columns) -> "
    "list of float or None"
)


@dataclass(frozen=True)
class UserFunction:
    """A user's function as f(inputs), bound to its hyperparameters."""

    function: Callable[[RewardInputs], Any]
    scope: Literal["completion", "group"]
    reads_ids: bool = False

    def __call__(self, inputs: RewardInputs) -> Any:
        return self.function(inputs)


def load_user_function(spec: str, hp: Mapping[str, Any]) -> UserFunction:
    """The function that ``spec`` names. Raises ValueError, with the file's own error in the message."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"reward {spec!r}: there is no file {file}; write path/to/file.py:function")
    try:
        module = import_file(file, f"user_reward_{file.stem}")
    except ValueError as error:
        raise ValueError(f"reward {spec!r}: {error}") from error
    if name not in vars(module):
        functions = (
            ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value)) or "none"
        )
        raise ValueError(
            f"reward {spec!r}: {file.name} has no function {name!r}; its functions are: {functions}"
        )
    function = vars(module)[name]
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {name} must be a function, got {function!r}; {_FORMS}")
    scope: Literal["completion", "group"] = getattr(function, "reward_scope", "completion")
    bound = _bind(spec, make_synchronous(function), hp)
    return UserFunction(bound, scope, isinstance(bound, TrlFunction) and bound.reads_ids)


def make_synchronous(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run to completion if it returns an awaitable: an ``async def``, or a wrapper of one."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **keywords: Any) -> Any:
        answer = function(*args, **keywords)
        return _loop().run(_await(answer)) if inspect.isawaitable(answer) else answer

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    call.__name__ = getattr(function, "__name__", type(function).__name__)
    return call


@functools.cache
def _loop() -> asyncio.Runner:
    """One event loop for the life of the process, because clients that a file opens once belong to it."""
    return asyncio.Runner()


async def _await(answer: Awaitable[Any]) -> Any:
    return await answer


def _bind(spec: str, function: Callable[..., Any], hp: Mapping[str, Any]) -> Callable[[RewardInputs], Any]:
    """``function`` as f(inputs), according to the form of its signature. Raises ValueError on other forms."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    takes_keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    positional_kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in parameters if parameter.kind in positional_kinds]
    if "completions" in signature.parameters or (takes_keywords and not positional):
        unknown = [] if takes_keywords else [key for key in hp if key not in signature.parameters]
        if unknown or any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
            refused = ", ".join(unknown) or "keywords"
            raise ValueError(
                f"reward {spec!r}: {function.__name__}{signature} does not take {refused}; {_FORMS}"
            )
        return TrlFunction(function, dict(hp))
    try:
        signature.bind(None, **hp)
    except TypeError as error:
        keywords = f" with {', '.join(hp)}" if hp else ""
        raise ValueError(
            f"reward {spec!r}: {function.__name__}{signature} cannot be called as f(inputs){keywords}: "
            f"{error}; {_FORMS}"
        ) from error
    return functools.partial(function, **hp)
