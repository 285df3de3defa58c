"""Collects the tests that a source defines, besides those that run when it is executed, by the rules of
pytest, unittest and HumanEval.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rltrain.reward.inside import pytest_names
from rltrain.reward.inside.faults import BadTests, Skipped

CHECK = "check"
CANDIDATE = "candidate"

Run = Callable[[], None]
Fixtures = Mapping[str, pytest_names.Fixture]


def replace_test_runners(sources: Sequence[str]) -> None:
    """Makes ``unittest.main`` and ``pytest.main`` do nothing, because all tests are run afterwards."""
    if any("pytest" in source for source in sources):
        sys.modules["pytest"] = pytest_names
    if any("unittest" in source for source in sources):
        import unittest

        unittest.main = lambda *_, **__: None  # type: ignore[assignment, misc]


def collect_tests(
    defined: Mapping[str, Any], entry: Callable[[], Any] | None, script_calls: bool
) -> Iterator[Run]:
    """One function per test among the names that a source has ``defined``: ``check``, ``test*`` functions and
    classes, TestCases.

    entry: returns the function under test, if the row names one; ``check`` gets it as its argument, and any
    test as the argument ``candidate``. script_calls: whether the source called the program when it was
    executed; its functions with arguments are then helpers, not tests. Raises BadTests if a test needs a
    fixture or parameter that does not exist.
    """
    own_fixtures = {name: value for name, value in defined.items() if isinstance(value, pytest_names.Fixture)}
    fixtures = {fixture.name or name: fixture for name, fixture in own_fixtures.items()}
    if entry is not None:
        fixtures |= {CANDIDATE: pytest_names.Fixture(lambda: entry(), CANDIDATE, False)}
    for name, value in defined.items():
        if name == CHECK and isinstance(value, types.FunctionType):
            yield from _check_tests(value, entry)
        elif name.startswith("test") and isinstance(value, types.FunctionType):
            yield from _function_tests(value, fixtures, is_optional=script_calls)
        elif isinstance(value, type) and _is_test_case(value):
            yield from _unittest_tests(value)
        elif isinstance(value, type) and name.startswith("Test") and value.__init__ is object.__init__:
            yield from _method_tests(value, fixtures)


def _check_tests(check: types.FunctionType, entry: Callable[[], Any] | None) -> Iterator[Run]:
    """HumanEval's ``check(candidate)``; a ``check`` with another number of arguments is a helper."""
    parameters = inspect.signature(check).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    if not required:
        yield check
    elif len(required) == 1 and entry is not None:
        yield lambda: check(entry())


# pytest -----------------------------------------------------------------------------------------------------


def _function_tests(
    function: Callable[..., Any], fixtures: Fixtures, is_optional: bool = False
) -> Iterator[Run]:
    """One test per combination of the function's parameters. is_optional: a function with a missing parameter
    is not a test.
    """
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise BadTests(f"{function.__name__} is asynchronous or a generator, which cannot be run as a test")
    marks = getattr(function, "pytestmark", [])
    if any(mark.name in pytest_names.NOT_RUN for mark in marks if mark.applies()):
        return
    tables = [mark.table() for mark in marks if mark.name == "parametrize"]
    for row in itertools.product(*reversed(tables)):
        values = {name: value for arguments in row for name, value in arguments.items()}
        missing = [
            name for name in _required_parameters(function) if name not in values and name not in fixtures
        ]
        if missing and is_optional:
            return
        if missing:
            names = ", ".join(missing)
            raise BadTests(f"{function.__name__} wants {names}, and there is no such fixture or parameter")
        yield lambda values=values: _call_with_fixtures(function, values, fixtures)


def _required_parameters(function: Callable[..., Any]) -> list[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return [
        name
        for name, parameter in parameters.items()
        if parameter.kind in named and parameter.default is parameter.empty
    ]


def _call_with_fixtures(function: Callable[..., Any], values: Mapping[str, Any], fixtures: Fixtures) -> None:
    """Calls a test. Each fixture is set up once for the test, after the fixtures that it needs, and torn down
    afterwards.
    """
    known: dict[str, Any] = dict(values)
    with contextlib.ExitStack() as stack:

        def fixture_value(name: str) -> Any:
            if name not in known:
                if name not in fixtures:
                    raise BadTests(f"a fixture wants {name}, and there is no such fixture")
                fixture = fixtures[name]
                names = _required_parameters(fixture.function)
                arguments = {argument: fixture_value(argument) for argument in names}
                known[name] = stack.enter_context(fixture.provide(arguments))
            return known[name]

        for name in (name for name, fixture in fixtures.items() if fixture.autouse):
            fixture_value(name)
        function(**{name: fixture_value(name) for name in _required_parameters(function)})


def _method_tests(kind: type, fixtures: Fixtures) -> Iterator[Run]:
    """The test methods of a class that is not a TestCase, each on its own instance."""
    unknown = [name for name in ("setup_class", "teardown_class", "pytestmark") if hasattr(kind, name)]
    if unknown:
        raise BadTests(f"{kind.__name__} has {', '.join(unknown)}, which is not supported")
    for name in [name for name in dir(kind) if name.startswith("test") and callable(getattr(kind, name))]:
        yield lambda name=name: _run_method(kind(), name, fixtures)


def _run_method(instance: Any, name: str, fixtures: Fixtures) -> None:
    """Runs a method with all of its parameters, each time between setup_method and teardown_method."""
    members = inspect.getmembers(type(instance), lambda member: isinstance(member, pytest_names.Fixture))
    own_fixtures = {fixture.name or key: fixture.bind(instance) for key, fixture in members}
    method = getattr(instance, name)
    for run in _function_tests(method, {**fixtures, **own_fixtures}):
        _call_hook("setup_method", instance, method)
        try:
            run()
        finally:
            _call_hook("teardown_method", instance, method)


def _call_hook(name: str, instance: Any, method: Any) -> None:
    hook = getattr(instance, name, None)
    if hook is not None:
        hook(*[method for _ in inspect.signature(hook).parameters])


# unittest ---------------------------------------------------------------------------------------------------


def _is_test_case(kind: type) -> bool:
    unittest = sys.modules.get("unittest")
    return unittest is not None and issubclass(kind, unittest.TestCase)


def _unittest_tests(kind: type) -> Iterator[Run]:
    import unittest

    class Result(unittest.TestResult):
        """Keeps the exception that ended a test."""

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
