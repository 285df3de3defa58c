"""Tests of a program that runs elsewhere: to them its functions are proxies that exchange data with it.

The tests and what they expect stay in this process, which the program cannot reach: it answers calls, and the
comparison is here. So is the count of calls: a program cannot feign one, and tests that pass without any say
nothing of it.
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

from reward.inside import collection
from reward.inside.faults import BadTests, ProgramFailed, Skipped
from reward.inside.wire import Hangup, NotPlain, packed, receive, send, unpacked


class Calls:
    """The program's functions and values, by name.

    calls: how often the tests called a function of the program, or read a global of it that is none, one that
    is not there included. To name a function, to pass it on or to ask whether it can be called is no call.
    """

    def __init__(self, channel: socket.socket, limit: int) -> None:
        self.channel, self.limit = channel, limit
        self.heard = False  # from then on, what the tests send may be what the program made
        self.calls = 0
        self.failure: ProgramFailed | None = None  # the latest; whatever a test makes of it, it has failed
        self.fault: BadTests | None = None
        self.proxies: dict[str, Callable[..., Any]] = {}

    def proxy(self, name: str) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            return self.call(name, positional, named)

        call.__name__ = call.__qualname__ = name
        return self.proxies.setdefault(name, call)

    def call(self, name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The result; containers among the arguments are changed as the program changed its copies. Raises
        what the program raised.
        """
        self.calls += 1
        arguments = list(positional)
        try:
            message = ["call", name, packed(arguments), packed(named)]
        except NotPlain as error:
            if self.heard:
                raise self.failed(f"the program's answer, sent back: {error}") from error
            raise self.blame(f"the tests call {name} with what is not plain data: {error}") from error
        return self.ask(message, arguments)

    def read(self, name: str) -> Any:
        """A global of the program: a proxy of what can be called, else its value. Raises NameError where
        there is none.
        """
        kind = self.kinds([name])[name]
        if kind == "function":
            return self.proxy(name)
        self.calls += 1
        if kind == "missing":
            raise NameError(f"name {name!r} is not defined")
        return self.ask(["value", name], [])

    def kinds(self, names: Sequence[str]) -> dict[str, str]:
        """What each is: "function", "value" or "missing"; "unknown" where the program does not load
        or answer.
        """
        with contextlib.suppress(Hangup, NotPlain, ValueError, TypeError, RecursionError, MemoryError):
            send(self.channel, ["kinds", list(names), None], self.limit)
            kinds, _, problem = receive(self.channel, self.limit)
            if problem is None and isinstance(kinds, list) and set(kinds) <= {"function", "value", "missing"}:
                return dict(zip(names, kinds, strict=True))
        return dict.fromkeys(names, "unknown")

    def ask(self, question: list[Any], arguments: list[Any]) -> Any:
        """The program's answer. Raises ProgramFailed where there is none, and what the program raised."""
        try:
            send(self.channel, question, self.limit)
        except NotPlain as error:
            if self.heard:
                raise self.failed(f"the program's answer, sent back: {error}") from error
            raise self.blame(f"the tests call {question[1]} with too much: {error}") from error
        except Hangup as error:
            raise self.failed("the program has ended") from error
        try:
            result, changed, problem = receive(self.channel, self.limit)
            self.heard = True
            if problem is None and changed is not None:
                for ours, theirs in zip(arguments, unpacked(changed), strict=True):
                    _make_equal(ours, theirs)
            answer = unpacked(result) if problem is None else None
            kind, message = problem or ("", "")
        except (Hangup, NotPlain, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise self.failed(f"the program's answer: {error}") from error
        if problem is not None:
            raise self.error(kind, message)
        return answer

    def error(self, kind: Any, message: Any) -> BaseException:
        """A built-in exception by its name. StopIteration would end a test's loop as if it had passed; what
        exits is no test's business.
        """
        found = getattr(builtins, str(kind), None)
        ends_loops = (StopIteration, StopAsyncIteration)
        if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, ends_loops):
            with contextlib.suppress(TypeError):  # UnicodeDecodeError and its like take more
                error = found(str(message))
                error.raised_by_program = True  # type: ignore[attr-defined]
                return error
        return self.failed(f"{kind}: {message}")

    def failed(self, message: str) -> ProgramFailed:
        self.failure = ProgramFailed(message)
        return self.failure

    def blame(self, message: str) -> BadTests:
        self.fault = BadTests(message)
        return self.fault


class Namespace(dict[str, Any]):
    """Globals of the tests in which values of the program, and what it lacks, are looked up when they are
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
    """The program, as tests may import it. ``import *`` takes nothing from it: names that the tests do not
    define are its own anyway, and one that shadows a built-in function would decide what an assertion means.
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
    """The tests, as ``import __main__`` finds them."""

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
    """``passed``: one verdict per test that calls the program, or ``fault``: why the row's tests said
    nothing.

    job: ``before`` (Python that the tests may use), ``tests`` (sources), ``entry`` (the function under test
    or None), ``module`` (the name under which they may import the program), ``limit``.
    """
    calls = Calls(channel, job["limit"])
    random.seed(0)
    try:
        namespace = _namespace(calls, job)
        collection.prepare(job["tests"])
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
    """Globals for the tests: what stands before them, and the program's functions. Its values, and what it
    lacks, are looked up.
    """
    entry = {job["entry"]} if job["entry"] else set()
    names = _unbound([job["before"], *job["tests"]]) | entry
    kinds = calls.kinds(sorted(names))
    functions = {name for name, kind in kinds.items() if kind == "function"}
    namespace: dict[str, Any] = {} if functions == names else Namespace(calls)
    namespace["__name__"] = "__main__"
    sys.modules["__main__"] = TestsModule(namespace)
    sys.modules[job["module"]] = ProgramModule(job["module"], calls)
    _execute(job["before"], namespace, "what stands before the tests")
    for name in entry:
        namespace.pop(name, None)
    namespace |= {name: calls.proxy(name) for name in functions}
    if isinstance(namespace, Namespace):
        namespace.names = names - functions
    return namespace


def _outcomes(
    source: str, namespace: dict[str, Any], entry: str | None, calls: Calls
) -> Iterator[bool | None]:
    """Of the source as a script, then of each test that it has defined; None of one that did not call the
    program.
    """
    before, code = dict(namespace), _compiled(source, "a test")
    script = _outcome(lambda: exec(code, namespace), calls, is_script=True)
    yield script
    if script is False:
        return
    proxies = set(map(id, calls.proxies.values()))
    fresh = {name: value for name, value in namespace.items() if before.get(name) is not value}
    defined = {name: value for name, value in fresh.items() if id(value) not in proxies}
    candidate = None if entry is None else lambda: namespace[entry]
    for test in collection.collect(defined, candidate, script is not None):
        yield _outcome(test, calls)


def _outcome(test: Callable[[], Any], calls: Calls, *, is_script: bool = False) -> bool | None:
    """Whether the test passes; None where it does without one call of the program, or does not count. Raises
    BadTests.
    """
    before, calls.failure = calls.calls, None
    passed = False
    try:
        test()
        passed = True
    except BadTests:
        raise
    except Skipped:
        return None
    except SystemExit as end:  # never the program's, which cannot raise it here
        passed = is_script and not end.code
    except (
        BaseException
    ) as error:  # a test fails by whatever it raises, such as a GeneratorExit, which is no Exception
        _blame_for_imports(error)
    if calls.fault is not None:
        raise calls.fault
    return (True if calls.calls > before else None) if passed and calls.failure is None else False


def _blame_for_imports(error: BaseException) -> None:
    """A module that the tests import and that is not there is not the program's fault."""
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


def _compiled(source: str, what: str) -> Any:
    try:
        return compile(source, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise BadTests(f"{what} is no Python: {error}") from error


def _execute(source: str, namespace: dict[str, Any], what: str) -> None:
    code = _compiled(source, what)
    try:
        exec(code, namespace)
    except BaseException as error:  # as in _passes, and said with its name
        raise BadTests(f"{what} fails: {type(error).__name__}: {error}") from error


def _unbound(sources: Sequence[str]) -> set[str]:
    """Global names that the sources use and do not define: the program's."""
    used: set[str] = set()
    bound: set[str] = set()
    for source in sources:
        _compiled(source, "a test")
        for table in _tables(symtable.symtable(source, "tests", "exec")):
            module = table.get_type() == "module"
            for symbol in table.get_symbols():
                if module and (symbol.is_assigned() or symbol.is_imported()):
                    bound.add(symbol.get_name())
                elif symbol.is_global() or module:
                    used.add(symbol.get_name())
    return used - bound - set(dir(builtins))


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


def _make_equal(ours: Any, theirs: Any) -> None:
    """A mutable argument of the tests becomes what the program made of its copy."""
    if type(ours) is not type(theirs):
        return
    if isinstance(ours, list | bytearray):
        ours[:] = theirs
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)
