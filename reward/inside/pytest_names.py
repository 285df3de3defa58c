"""What tests import from pytest, as far as it can be had without pytest: it stands in its place in the
sandbox.

All other names, and options that are not understood, are the row's fault and said by name.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward.inside.faults import BadTests, Skipped

NOT_RUN = ("skip", "skipif", "xfail")  # marks of tests that do not count


class Failed(Exception):
    """``fail``, or an exception that did not come."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise BadTests(f"the tests use pytest.{name}, which is not supported")


def main(*_: Any, **__: Any) -> int:
    """Nothing: all tests are run afterwards."""
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
    counts: bool


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
            return Mark(self.name, (), {})._put_on(args[0])
        return self._put_on(*args) if self.kwargs is not None else Mark(self.name, args, kwargs)

    def _put_on(self, target: Any) -> Any:
        target.pytestmark = [*getattr(target, "pytestmark", []), self]
        return target

    def applies(self) -> bool:
        """Whether what it is about holds: a skipif without its condition does not."""
        options = self.kwargs or {}
        conditions = [*self.args, options["condition"]] if "condition" in options else self.args
        return self.name == "skip" or not conditions or any(map(bool, conditions))

    def table(self) -> list[dict[str, Any]]:
        """Of parametrize: each row's arguments by name. Raises BadTests on what is not understood."""
        named = dict(zip(("argnames", "argvalues"), self.args, strict=False)) | dict(self.kwargs or {})
        names, rows = named.pop("argnames", ()), named.pop("argvalues", ())
        named.pop("ids", None)
        if named:
            raise BadTests(f"parametrize with {', '.join(named)} is not supported")
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",") if name.strip()]
        sets = [_parameter_set(row, len(names) == 1) for row in rows]
        if any(len(one.values) != len(names) for one in sets):
            raise BadTests(f"parametrize: each row must have one value for each of {', '.join(names)}")
        return [dict(zip(names, one.values, strict=True)) for one in sets if one.counts]


def _parameter_set(row: Any, alone: bool) -> ParameterSet:
    """alone: a row is a value, not one for each of several names."""
    return row if isinstance(row, ParameterSet) else ParameterSet((row,) if alone else tuple(row), True)


class Marks:
    def __getattr__(self, name: str) -> Mark:
        if name == "usefixtures":
            raise BadTests("pytest.mark.usefixtures is not supported")
        return Mark(name)


mark = Marks()


# fixtures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixture:
    """A function that makes what a test wants; a generator also takes it down."""

    function: Callable[..., Any]
    name: str | None
    autouse: bool

    def of(self, instance: Any) -> Fixture:
        """The same as a method of ``instance``."""
        return Fixture(functools.partial(self.function, instance), self.name, self.autouse)

    @contextlib.contextmanager
    def made(self, wanted: Mapping[str, Any]) -> Iterator[Any]:
        value = self.function(**wanted)
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
    """Of whatever scope, it is made anew for each test."""
    if params is not None:
        raise BadTests("fixtures with params are not supported")
    return (lambda of: Fixture(of, name, autouse)) if function is None else Fixture(function, name, autouse)


# comparisons ------------------------------------------------------------------------------------------------


class Raised:
    """What ``raises`` has caught, as ``value`` and ``type``."""

    value: BaseException
    type: type[BaseException]

    def __init__(self, expected: Any, match: str | None) -> None:
        self.expected, self.pattern = expected, match

    def __enter__(self) -> Raised:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> bool:
        if kind is None or value is None:
            raise Failed(f"did not raise {self.expected}")
        if not issubclass(kind, self.expected):
            return False
        self.value, self.type = value, kind
        if self.pattern is not None and re.search(self.pattern, str(value)) is None:
            raise Failed(f"{value!s:.200} does not match {self.pattern}") from value
        return True

    def match(self, pattern: str) -> bool:
        if re.search(pattern, str(self.value)) is None:
            raise Failed(f"{self.value!s:.200} does not match {pattern}")
        return True


def raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> Raised:
    """A context, or (with a function behind the exception) the call at once."""
    caught = Raised(expected, match)
    if call:
        with caught:
            call[0](*call[1:], **named)
    return caught


class Approximate:
    """Equal to numbers within a tolerance, and to lists, tuples and dicts of them."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None, absolute: float | None, nan_ok: bool) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, absolute, nan_ok

    def __eq__(self, got: object) -> bool:
        return self._near(got, self.expected)

    def _near(self, got: Any, expected: Any) -> bool:
        if isinstance(expected, Mapping):
            return (
                isinstance(got, Mapping)
                and got.keys() == expected.keys()
                and all(self._near(value, expected[key]) for key, value in got.items())
            )
        if isinstance(expected, list | tuple):
            alike = isinstance(got, list | tuple) and len(got) == len(expected)
            return alike and all(map(self._near, got, expected))
        if got == expected or not (_is_number(got) and _is_number(expected)):
            return bool(got == expected)
        if got != got or expected != expected:
            return self.nan_ok and got != got and expected != expected
        least = 1e-12 if self.abs is None else self.abs
        share = (1e-6 if self.abs is None else 0.0) if self.rel is None else self.rel
        if math.isinf(abs(got)) or math.isinf(abs(expected)):
            return False
        return abs(got - expected) <= max(share * abs(expected), least)


def approx(
    expected: Any,
    rel: float | None = None,
    abs: float | None = None,
    nan_ok: bool = False,
) -> Approximate:
    """By pytest's defaults: 1e-6 of the expected number, or 1e-12; with ``abs`` alone, that alone."""
    return Approximate(expected, rel, abs, nan_ok)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex) and not isinstance(value, bool)
