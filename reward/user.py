"""The user's own reward: ``path/to/file.py:function``, loaded by path. Nothing else in the project is named by a path.

Two forms are accepted, told apart by the signature:

    def f(inputs: RewardInputs, **hp) -> list[Score | float | None]
    def f(completions, prompts, answer, **columns) -> list[float | None]

The second is TRL's: completions and prompts are lists of strings, every column a list with one entry per completion.
None leaves a completion ungraded. ``@reward("name", scope="group")`` above the first form says that scores depend on one another.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from reward.resolve import Caught
from reward.score import RewardInputs

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_FORMS = "write f(inputs, **hp) -> list of Score, float or None; or TRL's f(completions, prompts, **columns) -> list of float or None"


def load_user_function(spec: str, hp: Mapping[str, Any]) -> Callable[[RewardInputs], Any]:
    """The function behind ``spec`` as f(inputs), with ``hp`` in place. Raises ValueError; the file's own error is in the message."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"reward {spec!r}: there is no file {file}; write path/to/file.py:function, relative to the current folder")
    module = _import_file(spec, file)
    if name not in vars(module):
        functions = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise ValueError(f"reward {spec!r}: {file.name} has no function {name!r}; its functions are: {functions}")
    function = vars(module)[name]
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {spec!r}: {name} must be an ordinary function, got {function!r}; {_FORMS}")
    bound = _bind(spec, function, hp)
    bound.reward_scope = getattr(function, "reward_scope", "completion")  # type: ignore[attr-defined]
    return bound


def call_in_trl_form(inputs: RewardInputs, function: Callable[..., Any], hp: Mapping[str, Any]) -> Any:
    """``function`` with TRL's keywords; a function without ``**columns`` gets only what it names.

    Raises ValueError where it names a column that the row does not have.
    """
    count = len(inputs.completions)
    values: dict[str, Any] = {name: [value] * count for name, value in inputs.columns.items()}
    values |= {"completions": list(inputs.completions), "prompts": [inputs.prompt] * count, **hp}
    parameters = inspect.signature(function).parameters
    missing = [key for key, one in parameters.items() if one.kind in _NAMED and one.default is one.empty and key not in values]
    if missing:
        there = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(f"{function.__name__} needs {', '.join(missing)}, but the row has no such column; its columns are: {there}")
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        values = {key: value for key, value in values.items() if key in parameters}
    return function(**values)


def _import_file(spec: str, file: Path) -> ModuleType:
    """The file as a module, its folder importable, as ``python file.py`` would have it."""
    found = importlib.util.spec_from_file_location(f"user_reward_{file.stem}", file)
    assert found is not None and found.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    with Caught() as caught:
        found.loader.exec_module(module)
    if caught.error is not None:
        raise ValueError(f"reward {spec!r}: {file} does not import: {caught}") from caught.error
    return module


def _bind(spec: str, function: Callable[..., Any], hp: Mapping[str, Any]) -> functools.partial[Any]:
    """``function`` as f(inputs), by the form its signature shows. Raises ValueError on a signature of neither form."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if "completions" in signature.parameters or (takes_any and not positional):
        unknown = [] if takes_any else [key for key in hp if key not in signature.parameters]
        if unknown or any(one.kind is one.POSITIONAL_ONLY for one in parameters):
            raise ValueError(f"reward {spec!r}: {function.__name__}{signature} does not take {', '.join(unknown) or 'keywords'}; {_FORMS}")
        return functools.partial(call_in_trl_form, function=function, hp=dict(hp))
    try:
        signature.bind(None, **hp)
    except TypeError as error:
        given = f" with {', '.join(hp)}" if hp else ""
        raise ValueError(
            f"reward {spec!r}: {function.__name__}{signature} cannot be called as f(inputs){given}: {error}; {_FORMS}"
        ) from error
    return functools.partial(function, **hp)
