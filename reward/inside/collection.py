"""Which tests a source has defined beside those that run when it is executed, by the rules of pytest,
unittest and HumanEval.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from reward.inside import pytest_names
from reward.inside.faults import BadTests, Skipped

CHECK, CANDIDATE = "check", "candidate"

Run = Callable[[], None]
Fixtures = Mapping[str, pytest_names.Fixture]


def prepare(sources: Sequence[str]) -> None:
    """``unittest.main`` and ``pytest.main`` do nothing for the tests, as all of these are run afterwards
    anyway.
    """
    if any("pytest" in source for source in sources):
        sys.modules["pytest"] = pytest_names
    if any("unittest" in source for source in sources):
        import unittest

        unittest.main = lambda *_, **__: None  # type: ignore[assignment, misc]


def collect(defined: Mapping[str, Any], entry: Callable[[], Any] | None, script_calls: bool) -> Iterator[Run]:
    """One function per test among the names that a source has ``defined``: ``check``, ``test*`` functions and
    classes, TestCases.

    entry: gives the function under test, where the row names one; it is ``check``'s argument, and that of any
    test that calls it ``candidate``. script_calls: whether the source has called the program when it was
    executed; its functions with arguments are then helpers, and not tests. Raises BadTests where a test wants
    what is not there.
    """
    own = {name: value for name, value in defined.items() if isinstance(value, pytest_names.Fixture)}
    fixtures = {fixture.name or name: fixture for name, fixture in own.items()}
    if entry is not None:
        fixtures |= {CANDIDATE: pytest_names.Fixture(lambda: entry(), CANDIDATE, False)}
    for name, value in defined.items():
        if name == CHECK and isinstance(value, types.FunctionType):
            yield from _check(value, entry)
        elif name.startswith("test") and isinstance(value, types.FunctionType):
            yield from _calls(value, fixtures, optional=script_calls)
        elif isinstance(value, type) and _is_test_case(value):
            yield from _cases(value)
        elif isinstance(value, type) and name.startswith("Test") and value.__init__ is object.__init__:
            yield from _methods(value, fixtures)


def _check(check: types.FunctionType, entry: Callable[[], Any] | None) -> Iterator[Run]:
    """HumanEval's ``check(candidate)``; one that wants another number of arguments is a helper."""
    wanted = [one for one in inspect.signature(check).parameters.values() if one.default is one.empty]
    if not wanted:
        yield check
    elif len(wanted) == 1 and entry is not None:
        yield lambda: check(entry())


# pytest -----------------------------------------------------------------------------------------------------


def _calls(function: Callable[..., Any], fixtures: Fixtures, optional: bool = False) -> Iterator[Run]:
    """The function once for each combination of its parameters. optional: it is no test where one is
    missing.
    """
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise BadTests(f"{function.__name__} is asynchronous or a generator, which cannot be run as a test")
    marks = getattr(function, "pytestmark", [])
    if any(mark.name in pytest_names.NOT_RUN for mark in marks if mark.applies()):
        return
    tables = [mark.table() for mark in marks if mark.name == "parametrize"]
    for row in itertools.product(*reversed(tables)):
        values = {name: value for given in row for name, value in given.items()}
        missing = [name for name in _wanted(function) if name not in values and name not in fixtures]
        if missing and optional:
            return
        if missing:
            what = ", ".join(missing)
            raise BadTests(f"{function.__name__} wants {what}, and there is no such fixture or parameter")
        yield lambda values=values: _with_fixtures(function, values, fixtures)


def _wanted(function: Callable[..., Any]) -> list[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return [name for name, one in parameters.items() if one.kind in named and one.default is one.empty]


def _with_fixtures(function: Callable[..., Any], values: Mapping[str, Any], fixtures: Fixtures) -> None:
    """Each fixture is made once for the test, those of fixtures first, and taken down after it."""
    made: dict[str, Any] = dict(values)
    with contextlib.ExitStack() as stack:

        def value_of(name: str) -> Any:
            if name not in made:
                if name not in fixtures:
                    raise BadTests(f"a fixture wants {name}, and there is no such fixture")
                fixture = fixtures[name]
                wanted = {one: value_of(one) for one in _wanted(fixture.function)}
                made[name] = stack.enter_context(fixture.made(wanted))
            return made[name]

        for name in (name for name, fixture in fixtures.items() if fixture.autouse):
            value_of(name)
        function(**{name: value_of(name) for name in _wanted(function)})


def _methods(kind: type, fixtures: Fixtures) -> Iterator[Run]:
    """Test methods of a class that is no TestCase, each on an instance of its own."""
    unknown = [name for name in ("setup_class", "teardown_class", "pytestmark") if hasattr(kind, name)]
    if unknown:
        raise BadTests(f"{kind.__name__} has {', '.join(unknown)}, which is not supported")
    for name in [name for name in dir(kind) if name.startswith("test") and callable(getattr(kind, name))]:
        yield lambda name=name: _run_method(kind(), name, fixtures)


def _run_method(instance: Any, name: str, fixtures: Fixtures) -> None:
    """Between setup_method and teardown_method, with all of its parameters."""
    members = inspect.getmembers(type(instance), lambda member: isinstance(member, pytest_names.Fixture))
    own = {fixture.name or key: fixture.of(instance) for key, fixture in members}
    method = getattr(instance, name)
    for run in _calls(method, {**fixtures, **own}):
        _around("setup_method", instance, method)
        try:
            run()
        finally:
            _around("teardown_method", instance, method)


def _around(name: str, instance: Any, method: Any) -> None:
    around = getattr(instance, name, None)
    if around is not None:
        around(*[method for _ in inspect.signature(around).parameters])


# unittest ---------------------------------------------------------------------------------------------------


def _is_test_case(kind: type) -> bool:
    unittest = sys.modules.get("unittest")
    return unittest is not None and issubclass(kind, unittest.TestCase)


def _cases(kind: type) -> Iterator[Run]:
    import unittest

    class Result(unittest.TestResult):
        """Keeps what ended a test."""

        problem: BaseException | None = None

        def addError(self, test: Any, err: Any) -> None:
            self.problem = err[1]

        addFailure = addError

        def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
            self.problem = self.problem or (err and err[1])

        def addSkip(self, test: Any, reason: str) -> None:
            self.problem = Skipped(reason)

        def addUnexpectedSuccess(self, test: Any) -> None:
            self.problem = AssertionError("it was expected to fail")

    def run(case: Any) -> None:
        result = Result()
        unittest.TestSuite([case]).run(result)
        if result.problem is not None:
            raise result.problem

    for case in unittest.defaultTestLoader.loadTestsFromTestCase(kind):
        yield lambda case=case: run(case)
