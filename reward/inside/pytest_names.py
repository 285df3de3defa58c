"""Replaces pytest in the sandbox: the part of its interface that tests import and that works without pytest.

Other names, and unsupported options, are the row's fault; the error names them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.reward.inside.faults import BadTests, Skipped

NOT_RUN = ("skip", "skipif", "xfail")  # marks of tests that do not count


class Failed(Exception):
    """A call of ``fail``, or an expected exception that was not raised."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise BadTests(f"the tests use pytest.{name}, which is not supported")


def main(*_: Any, **__: Any) -> int:
    """Does nothing: all tests are run afterwards."""
    return 0


def fail(reason: str = "", pytrace: bool = True) -> None:
    raise Failed(reason)


def skip(reason: str = "", *, allow_module_level: bool = False) -> None:
    raise Skipped(reason)


def xfail(reason: str = "") -> None:
    raise Skipped(reason)


# marks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterSet:
    """One row of ``parametrize``."""

    values: tuple[Any, ...]
    is_run: bool


def param(*values: Any, marks: Any = (), id: str | None = None) -> ParameterSet:
    marks = marks if isinstance(marks, Sequence) else (marks,)
    return ParameterSet(values, not any(mark.name in NOT_RUN and mark.applies() for mark in marks))


@dataclass(frozen=True)
class Mark:
    """A mark, as a decorator with or without arguments."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kwargs is None and not kwargs and len(args) == 1 and callable(args[0]):
            return Mark(self.name, (), {})._attach_to(args[0])
        return self._attach_to(*args) if self.kwargs is not None else Mark(self.name, args, kwargs)

    def _attach_to(self, target: Any) -> Any:
        target.pytestmark = [*getattr(target, "pytestmark", []), self]
        return target

    def applies(self) -> bool:
        """Whether the mark is in effect: a skipif with a false condition is not."""
        options = self.kwargs or {}
        conditions = [*self.args, options["condition"]] if "condition" in options else self.args
        return self.name == "skip" or not conditions or any(map(bool, conditions))

    def table(self) -> list[dict[str, Any]]:
        """For parametrize: each row's arguments by name. Raises BadTests on unsupported options."""
        named = dict(zip(("argnames", "argvalues"), self.args, strict=False)) | dict(self.kwargs or {})
        names = named.pop("argnames", ())
        rows = named.pop("argvalues", ())
        named.pop("ids", None)
        if named:
            raise BadTests(f"parametrize with {', '.join(named)} is not supported")
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",") if name.strip()]
        sets = [_parameter_set(row, len(names) == 1) for row in rows]
        if any(len(row.values) != len(names) for row in sets):
            raise BadTests(f"parametrize: each row must have one value for each of {', '.join(names)}")
        return [dict(zip(names, row.values, strict=True)) for row in sets if row.is_run]


def _parameter_set(row: Any, is_single_value: bool) -> ParameterSet:
    """is_single_value: a row is one value, not a sequence with a value for each of several names."""
    return (
        row
        if isinstance(row, ParameterSet)
        else ParameterSet((row,) if is_single_value else tuple(row), True)
    )


class Marks:
    def __getattr__(self, name: str) -> Mark:
        if name == "usefixtures":
            raise BadTests("pytest.mark.usefixtures is not supported")
        return Mark(name)


mark = Marks()


# fixtures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixture:
    """A function that sets up a value for a test; a generator also tears it down."""

    function: Callable[..., Any]
    name: str | None
    autouse: bool

    def bind(self, instance: Any) -> Fixture:
        """The same fixture as a method of ``instance``."""
        return Fixture(functools.partial(self.function, instance), self.name, self.autouse)

    @contextlib.contextmanager
    def provide(self, arguments: Mapping[str, Any]) -> Iterator[Any]:
        value = self.function(**arguments)
        if not hasattr(value, "__next__"):
            yield value
            return
        yield next(value)
        next(value, None)


def fixture(
    function: Any = None,
    *,
    scope: Any = "function",
    params: Any = None,
    autouse: bool = False,
    name: str | None = None,
) -> Any:
    """A fixture; it is set up again for each test, whatever its scope."""
    if params is not None:
        raise BadTests("fixtures with params are not supported")
    return (
        (lambda target: Fixture(target, name, autouse))
        if function is None
        else Fixture(function, name, autouse)
    )


# comparisons ------------------------------------------------------------------------------------------------


class RaisesContext:
    """The exception that ``raises`` caught, as ``value`` and ``type``."""

    value: BaseException
    type: type[BaseException]

    def __init__(self, expected: Any, match: str | None) -> None:
        self.expected = expected
        self.pattern = match

    def __enter__(self) -> RaisesContext:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> bool:
        if kind is None or value is None:
            raise Failed(f"did not raise {self.expected}")
        if not issubclass(kind, self.expected):
            return False
        self.value = value
        self.type = kind
        if self.pattern is not None and re.search(self.pattern, str(value)) is None:
            raise Failed(f"{value!s:.200} does not match {self.pattern}") from value
        return True

    def match(self, pattern: str) -> bool:
        if re.search(pattern, str(self.value)) is None:
            raise Failed(f"{self.value!s:.200} does not match {pattern}")
        return True


def raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> RaisesContext:
    """A context, or, with a function after the exception type, an immediate call."""
    caught = RaisesContext(expected, match)
    if call:
        with caught:
            call[0](*call[1:], **named)
    return caught


class Approximate:
    """Compares equal to numbers within a tolerance, and to lists, tuples and dicts of them."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None, absolute: float | None, nan_ok: bool) -> None:
        self.expected = expected
        self.rel = rel
        self.abs = absolute
        self.nan_ok = nan_ok

    def __eq__(self, actual: object) -> bool:
        return self._is_close(actual, self.expected)

    def _is_close(self, actual: Any, expected: Any) -> bool:
        if isinstance(expected, Mapping):
            return (
                isinstance(actual, Mapping)
                and actual.keys() == expected.keys()
                and all(self._is_close(value, expected[key]) for key, value in actual.items())
            )
        if isinstance(expected, list | tuple):
            same_length = isinstance(actual, list | tuple) and len(actual) == len(expected)
            return same_length and all(map(self._is_close, actual, expected))
        if actual == expected or not (_is_number(actual) and _is_number(expected)):
            return bool(actual == expected)
        if actual != actual or expected != expected:
            return self.nan_ok and actual != actual and expected != expected
        absolute = 1e-12 if self.abs is None else self.abs
        relative = (1e-6 if self.abs is None else 0.0) if self.rel is None else self.rel
        if math.isinf(abs(actual)) or math.isinf(abs(expected)):
            return False
        return abs(actual - expected) <= max(relative * abs(expected), absolute)


def approx(
    expected: Any,
    rel: float | None = None,
    abs: float | None = None,
    nan_ok: bool = False,
) -> Approximate:
    """Approximate equality with pytest's defaults: 1e-6 of the expected number, or 1e-12; with ``abs`` alone,
    only ``abs``."""
    return Approximate(expected, rel, abs, nan_ok)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex) and not isinstance(value, bool)
