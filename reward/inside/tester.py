"""Runs the tests of a program that is in another process: its functions are proxies that exchange data with
it.

The tests and their expected values stay in this process, which the program cannot reach: the program answers
calls, and the comparison happens here. The calls are counted here too: a program cannot fake one, and tests
that pass without a call prove nothing about the program.
"""

from __future__ import annotations

import builtins
import contextlib
import random
import socket
import symtable
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from rltrain.reward.inside import collection
from rltrain.reward.inside.faults import BadTests, ProgramFailed, Skipped
from rltrain.reward.inside.wire import Hangup, NotPlain, pack, receive_message, send_message, unpack


class Calls:
    """The program's functions and values, by name.

    calls: how often the tests called a function of the program, or read another global of it, even a missing
    one. Naming a function, passing it on or asking whether it is callable is not a call.
    """

    def __init__(self, channel: socket.socket, limit: int) -> None:
        self.channel = channel
        self.limit = limit
        self.has_answered = False  # from then on, the tests may send data that the program made
        self.calls = 0
        # The latest failure of the program; a test fails with it even if it catches the exception.
        self.failure: ProgramFailed | None = None
        self.fault: BadTests | None = None
        self.proxies: dict[str, Callable[..., Any]] = {}

    def proxy(self, name: str) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            return self.call(name, positional, named)

        call.__name__ = call.__qualname__ = name
        return self.proxies.setdefault(name, call)

    def call(self, name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The result of a call. Containers among the arguments change as the program changed its copies.
        Raises the program's exception.
        """
        self.calls += 1
        arguments = list(positional)
        try:
            message = ["call", name, pack(arguments), pack(named)]
        except NotPlain as error:
            if self.has_answered:
                raise self.record_failure(f"the program's answer, sent back: {error}") from error
            raise self.record_fault(
                f"the tests call {name} with a value that is not plain data: {error}"
            ) from error
        return self.ask(message, arguments)

    def read(self, name: str) -> Any:
        """A global of the program: a proxy for a callable, else its value. Raises NameError if there is
        none."""
        kind = self.kinds([name])[name]
        if kind == "function":
            return self.proxy(name)
        self.calls += 1
        if kind == "missing":
            raise NameError(f"name {name!r} is not defined")
        return self.ask(["value", name], [])

    def kinds(self, names: Sequence[str]) -> dict[str, str]:
        """The kind of each name: "function", "value" or "missing"; "unknown" if the program does not load or
        answer."""
        with contextlib.suppress(Hangup, NotPlain, ValueError, TypeError, RecursionError, MemoryError):
            send_message(self.channel, ["kinds", list(names), None], self.limit)
            kinds, _, problem = receive_message(self.channel, self.limit)
            if problem is None and isinstance(kinds, list) and set(kinds) <= {"function", "value", "missing"}:
                return dict(zip(names, kinds, strict=True))
        return dict.fromkeys(names, "unknown")

    def ask(self, question: list[Any], arguments: list[Any]) -> Any:
        """The program's answer. Raises ProgramFailed if there is none, or the program's exception."""
        try:
            send_message(self.channel, question, self.limit)
        except NotPlain as error:
            if self.has_answered:
                raise self.record_failure(f"the program's answer, sent back: {error}") from error
            raise self.record_fault(f"the tests call {question[1]} with too much: {error}") from error
        except Hangup as error:
            raise self.record_failure("the program has ended") from error
        try:
            result, changed, problem = receive_message(self.channel, self.limit)
            self.has_answered = True
            if problem is None and changed is not None:
                for original, changed_value in zip(arguments, unpack(changed), strict=True):
                    _copy_contents(original, changed_value)
            answer = unpack(result) if problem is None else None
            kind, message = problem or ("", "")
        except (Hangup, NotPlain, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise self.record_failure(f"the program's answer: {error}") from error
        if problem is not None:
            raise self.exception_for(kind, message)
        return answer

    def exception_for(self, kind: Any, message: Any) -> BaseException:
        """A built-in exception by its name. StopIteration, which would end a test's loop as if it had passed,
        and exceptions that exit become a failure of the program.
        """
        error_type = getattr(builtins, str(kind), None)
        ends_loops = (StopIteration, StopAsyncIteration)
        if (
            isinstance(error_type, type)
            and issubclass(error_type, Exception)
            and not issubclass(error_type, ends_loops)
        ):
            with contextlib.suppress(TypeError):  # UnicodeDecodeError and some others take more arguments
                error = error_type(str(message))
                error.raised_by_program = True  # type: ignore[attr-defined]
                return error
        return self.record_failure(f"{kind}: {message}")

    def record_failure(self, message: str) -> ProgramFailed:
        self.failure = ProgramFailed(message)
        return self.failure

    def record_fault(self, message: str) -> BadTests:
        self.fault = BadTests(message)
        return self.fault


class Namespace(dict[str, Any]):
    """The tests' globals. Names of the program's values, and names that it lacks, are looked up when they are
    read.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.names: set[str] = set()

    def __missing__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.calls.read(name)


class ProgramModule(ModuleType):
    """The program, as a module that tests may import. ``import *`` imports nothing: names that the tests do
    not define are the program's anyway, and a name that shadows a built-in function would change what an
    assertion means.
    """

    __all__ = ()

    def __init__(self, name: str, calls: Calls) -> None:
        super().__init__(name)
        self.__calls = calls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.__calls.read(name)
        except NameError as error:
            if getattr(error, "raised_by_program", False):
                raise
            raise AttributeError(f"the program defines no {name!r}") from error


class TestsModule(ModuleType):
    """The tests, as the module that ``import __main__`` returns."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        super().__init__("__main__")
        self.__namespace = namespace

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__namespace[name]
        except KeyError:
            raise AttributeError(name) from None

    def __dir__(self) -> list[str]:
        return list(self.__namespace)


def run(channel: socket.socket, job: dict[str, Any]) -> dict[str, Any]:
    """``passed``, one verdict per test that calls the program, or ``fault``, the reason why the tests gave
    none.

    job: ``before`` (Python that the tests may use), ``tests`` (sources), ``entry`` (the function under test
    or None), ``module`` (the name under which they may import the program), ``limit``.
    """
    calls = Calls(channel, job["limit"])
    random.seed(0)
    try:
        namespace = _namespace(calls, job)
        collection.replace_test_runners(job["tests"])
        outcomes: list[bool | None] = []
        for source in job["tests"]:
            outcomes += _outcomes(source, namespace, job["entry"], calls)
        passed = [outcome for outcome in outcomes if outcome is not None]
        if not passed:
            raise BadTests(_why_no_call(namespace, job))
        return {"passed": passed}
    except BadTests as fault:
        return {"fault": str(fault)[:500]}


def _namespace(calls: Calls, job: dict[str, Any]) -> dict[str, Any]:
    """The tests' globals: the names of the Python before the tests, and the program's functions. The
    program's values and missing names are looked up when they are read.
    """
    entry = {job["entry"]} if job["entry"] else set()
    names = _undefined_names([job["before"], *job["tests"]]) | entry
    kinds = calls.kinds(sorted(names))
    functions = {name for name, kind in kinds.items() if kind == "function"}
    namespace: dict[str, Any] = {} if functions == names else Namespace(calls)
    namespace["__name__"] = "__main__"
    sys.modules["__main__"] = TestsModule(namespace)
    sys.modules[job["module"]] = ProgramModule(job["module"], calls)
    _execute(job["before"], namespace, "the Python before the tests")
    for name in entry:
        namespace.pop(name, None)
    namespace |= {name: calls.proxy(name) for name in functions}
    if isinstance(namespace, Namespace):
        namespace.names = names - functions
    return namespace


def _outcomes(
    source: str, namespace: dict[str, Any], entry: str | None, calls: Calls
) -> Iterator[bool | None]:
    """The outcome of the source as a script, then of each test that it defines; None for a test that did not
    call the program.
    """
    before = dict(namespace)
    code = _compile(source, "a test")
    script = _outcome(lambda: exec(code, namespace), calls, is_script=True)
    yield script
    if script is False:
        return
    proxies = set(map(id, calls.proxies.values()))
    fresh = {name: value for name, value in namespace.items() if before.get(name) is not value}
    defined = {name: value for name, value in fresh.items() if id(value) not in proxies}
    candidate = None if entry is None else lambda: namespace[entry]
    for test in collection.collect_tests(defined, candidate, script is not None):
        yield _outcome(test, calls)


def _outcome(test: Callable[[], Any], calls: Calls, *, is_script: bool = False) -> bool | None:
    """Whether the test passes; None if it passes without calling the program or does not count. Raises
    BadTests."""
    calls_before = calls.calls
    calls.failure = None
    passed = False
    try:
        test()
        passed = True
    except BadTests:
        raise
    except Skipped:
        return None
    except SystemExit as end:  # raised by a test: the program cannot raise it here
        passed = is_script and not end.code
    except (
        BaseException
    ) as error:  # any exception fails a test, even one that is no Exception (GeneratorExit)
        _raise_missing_import(error)
    if calls.fault is not None:
        raise calls.fault
    if not passed or calls.failure is not None:
        return False
    return True if calls.calls > calls_before else None


def _raise_missing_import(error: BaseException) -> None:
    """Raises BadTests if the tests import a missing module, which is not the program's fault."""
    if isinstance(error, ModuleNotFoundError) and not getattr(error, "raised_by_program", False):
        raise BadTests(
            f"the tests import {error.name}, which is not there: set packages where it is installed, module "
            "where it is the program"
        ) from error


def _why_no_call(namespace: dict[str, Any], job: dict[str, Any]) -> str:
    check = namespace.get(collection.CHECK)
    if check is not None and not job["entry"]:
        return (
            "no test calls the program: check(candidate) needs the name of its function, and the row gives "
            "none; set entry_column"
        )
    return "no test calls the program (a function of it, or reads a value), so that every program would pass"


def _compile(source: str, what: str) -> Any:
    try:
        return compile(source, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise BadTests(f"{what} is not valid Python: {error}") from error


def _execute(source: str, namespace: dict[str, Any], what: str) -> None:
    code = _compile(source, what)
    try:
        exec(code, namespace)
    except BaseException as error:  # as in _outcome, with the exception's name
        raise BadTests(f"{what} fails: {type(error).__name__}: {error}") from error


def _undefined_names(sources: Sequence[str]) -> set[str]:
    """Global names that the sources use and do not define: these are the program's."""
    used: set[str] = set()
    defined: set[str] = set()
    for source in sources:
        _compile(source, "a test")
        for table in _symbol_tables(symtable.symtable(source, "tests", "exec")):
            module = table.get_type() == "module"
            for symbol in table.get_symbols():
                if module and (symbol.is_assigned() or symbol.is_imported()):
                    defined.add(symbol.get_name())
                elif symbol.is_global() or module:
                    used.add(symbol.get_name())
    return used - defined - set(dir(builtins))


def _symbol_tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _symbol_tables(child)


def _copy_contents(original: Any, changed_value: Any) -> None:
    """Gives a mutable argument of the tests the contents of the program's changed copy."""
    if type(original) is not type(changed_value):
        return
    if isinstance(original, list | bytearray):
        original[:] = changed_value
    elif isinstance(original, dict | set):
        original.clear()
        original.update(changed_value)
