"""Runs somebody else's Python where it can do no harm, beside its tests, which it cannot see.

A program and its tests are two processes, each shut in by itself: no network, no files but Python and the
system's libraries (read-only) and an empty folder in memory, limits on everything, user, process, mount,
network, IPC and host-name namespaces of its own. Nothing can be done to a file that another sandbox would
notice: locks, leases and watches are refused (to SQLite in a file too). They exchange calls and plain data
over a socket pair; the verdict is the tests' alone and comes over a channel that the program does not hold.
What a program prints goes nowhere, unless it is run for that (``run``): then it gets its input and nothing
else, and what is expected stays with the grader.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from reward.inside.names import DEVICES
from reward.inside.wire import Hangup, NotPlain, receive, send

Kind = Literal["root", "user", "bubblewrap", "none"]

_HERE = Path(__file__).parent
_START = (
    "import sys; package = type(sys)('reward'); package.__path__ = [sys.argv[1]]; sys.modules['reward'] = "
    "package; "
    "from reward.inside.start import nursery, wrapped; "
)
_START_SECONDS = 20.0  # a machine under load; this is no time that a program could use
_STOP_SECONDS = 2.0
_JOB_BYTES = 1 << 26
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
_ENVIRONMENT = {
    **{"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
}


@dataclass(frozen=True)
class Limits:
    """Of one program and its tests, beyond which it has failed."""

    seconds: float  # wall clock, loading included, starting the sandbox not
    memory_mib: int  # address space of each process
    processes: int  # threads included
    file_mib: int  # of one file and of all together
    message_mib: int  # of one call or answer


@dataclass(frozen=True)
class Tests:
    """Sources that run outside the program. ``before``: Python they may use. ``entry``: the function that
    ``check(candidate)`` gets.

    ``module``: the name under which they may import the program.
    """

    __test__ = False  # for pytest: this is no test class

    sources: tuple[str, ...]
    before: str
    entry: str | None
    module: str = "solution"


@dataclass(frozen=True)
class Verdict:
    """passed: one per test that calls the program. ended: "done", "timeout" (beyond Limits.seconds) or "gone"
    (the tests' process ended without a verdict)."""

    passed: tuple[bool, ...]
    ended: Literal["done", "timeout", "gone"]


@dataclass(frozen=True)
class Ran:
    """What a program printed. ended: "done" (status 0), "failed" (another status, or killed),
    "timeout", "flood" (it printed too much).
    """

    printed: bytes
    ended: Literal["done", "failed", "timeout", "flood"]
    seconds: float  # from its first line to its end


class SandboxError(Exception):
    """The sandbox failed, not what was to run in it."""


class TestsError(Exception):
    """The row's tests cannot be run, whatever the program."""

    __test__ = False


def judge(source: str, tests: Tests, limits: Limits, kind: Kind, packages: bool = False) -> Verdict:
    """Whether the program ``source`` passes. Raises TestsError and SandboxError, neither of which is the
    program's fault.

    A test is what a source does when it is executed, and each ``check``, pytest function and unittest method
    that it defines; one that passes without one call of the program does not count, and where none counts the
    tests are at fault (``reward.inside.tester``).

    packages: the program may import what is installed beside this Python, not just its standard library.
    """
    calls, answers = socket.socketpair()
    common = _common(limits, packages)
    told = {
        "tests": list(tests.sources),
        "before": tests.before,
        "entry": tests.entry,
        "module": tests.module,
    }
    with (
        calls,
        answers,
        Inmate(kind, calls, {**common, **told, "role": "tests"}) as tester,
        Inmate(kind, answers, {**common, "role": "program", "source": source}) as program,
    ):
        calls.close()
        answers.close()
        deadline = time.monotonic() + _START_SECONDS
        for inmate in (tester, program):
            inmate.wait_until_ready(deadline)
        for inmate in (program, tester):
            inmate.go()
        return _verdict(tester, len(tests.sources), limits.seconds)


def run(source: str, stdin: str, limits: Limits, kind: Kind, packages: bool = False) -> Ran:
    """The program ``source`` by itself, with ``stdin`` to read. limits.message_mib is what it may print.

    Raises SandboxError.
    """
    ours, theirs = socket.socketpair()
    job = {**_common(limits, packages), "role": "script", "source": source, "stdin": stdin}
    with ours, theirs, Inmate(kind, theirs, job) as program:
        theirs.close()
        ours.shutdown(socket.SHUT_WR)
        program.wait_until_ready(time.monotonic() + _START_SECONDS)
        program.go()
        started = time.monotonic()
        printed = bytearray()
        ended = _followed(program, ours, printed, limits.message_mib << 20, started + limits.seconds)
        return Ran(bytes(printed), ended, time.monotonic() - started)


def _followed(
    program: Inmate, channel: socket.socket, printed: bytearray, most: int, deadline: float
) -> Literal["done", "failed", "timeout", "flood"]:
    """How a program ended; ``printed`` gets what came before, at most about ``most`` bytes."""
    try:
        while part := _more(channel, deadline):
            printed += part
            if len(printed) > most:
                return "flood"
        return "done" if program.hear(deadline).get("status") == 0 else "failed"
    except TimeoutError:
        return "timeout"
    except (Hangup, NotPlain):
        return "failed"


def _more(channel: socket.socket, deadline: float) -> bytes:
    """What arrives next, nothing at the end. Raises TimeoutError at the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    channel.settimeout(left)
    return channel.recv(1 << 16)


def choose_kind(unsandboxed: bool) -> Kind:
    """How this machine can shut a program in.

    Raises ValueError where it cannot, unless ``unsandboxed`` says to go on without.
    """
    try:
        return _best_kind()
    except SandboxError as error:
        if unsandboxed:
            return "none"
        raise ValueError(
            f"code cannot be run safely on this machine ({error}). Install bubblewrap (bwrap), or allow "
            "unprivileged user namespaces (in "
            "a container: --security-opt seccomp=unconfined, or --cap-add SYS_ADMIN), or, where the machine "
            "itself is disposable, write "
            "unsandboxed: true under the reward"
        ) from error


@functools.cache
def _best_kind() -> Kind:
    """The first kind that works when tried.

    Raises SandboxError, which is not remembered: the next completion tries again.
    """
    reasons: list[str] = []
    for kind in candidates():
        problem = try_kind(kind)
        if problem is None:
            return kind
        reasons.append(f"{kind}: {problem}")
    raise SandboxError("; ".join(reasons) or f"sandboxes are Linux's, this is {sys.platform}")


def candidates() -> list[Kind]:
    """What may work here, best first. Bubblewrap starts a further interpreter (0.2 s) and cannot limit the
    number of files; it is for machines whose kernel grants namespaces to it and not to everybody."""
    if sys.platform != "linux":
        return []
    bubblewrap: list[Kind] = ["bubblewrap"] if shutil.which("bwrap") else []
    return ["root", "user", *bubblewrap] if os.geteuid() == 0 else ["user", *bubblewrap]


def try_kind(kind: Kind) -> str | None:
    """None where a program shut in this way answers, has the process numbers to itself, and can write
    in its folder only.
    """
    limits = Limits(seconds=10.0, memory_mib=256, processes=1, file_mib=1, message_mib=1)
    tests = Tests(("assert look() == (True, 2, False)",), "", None)
    try:
        verdict = judge(_LOOK, tests, limits, kind)
    except (SandboxError, TestsError, OSError) as error:
        return str(error)
    return (
        None
        if verdict.passed == (True,)
        else "started, but a program in it sees other processes or can write outside its folder"
    )


_LOOK = """
import os

def look():
    open("/tmp/mine", "w").close()
    outside = [path for path in ("/", "/usr", "/etc", "/dev", "/var/tmp", "/home") if os.access(path, os.W_OK)]
    return os.path.exists("/tmp/mine"), os.getpid(), bool(outside) or os.path.exists("/proc/1")
"""


def _common(limits: Limits, packages: bool) -> dict[str, Any]:
    """What program and tests are told alike."""
    bases = [
        path
        for path in sys.path
        if path and Path(path).is_relative_to(sys.base_prefix) and "-packages" not in path
    ]
    installed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) if packages else []
    readable, links = _visible([*_SYSTEM, sys.base_prefix, *installed])
    return {
        **{
            "readable": readable,
            "links": links,
            "path": [*bases, *installed],
            "limit": limits.message_mib << 20,
        },
        **{
            "memory_bytes": limits.memory_mib << 20,
            "cpu_seconds": int(limits.seconds) + 2,
            "file_bytes": limits.file_mib << 20,
        },
        "processes": limits.processes,
    }


def _visible(paths: Sequence[str]) -> tuple[list[str], Mapping[str, str]]:
    """Files and folders to show, none inside another, and symbolic links to make (``/lib`` is
    ``usr/lib`` on most systems).
    """
    there = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    links = {path: os.readlink(path) for path in there if os.path.islink(path) and path.count("/") == 1}
    plain = [path for path in there if path not in links]
    shown = [
        path
        for path in plain
        if not any(path != other and Path(path).is_relative_to(other) for other in plain)
    ]
    return shown, links


def _verdict(tester: Inmate, count: int, seconds: float) -> Verdict:
    """Nobody but the tests can say that they passed: no word, or a strange one, is a failure of the
    program that they called.
    """
    none = (False,) * count
    try:
        said = tester.hear(time.monotonic() + seconds)
    except TimeoutError:
        return Verdict(none, "timeout")
    except (Hangup, NotPlain):
        return Verdict(none, "gone")
    if "fault" in said:
        raise TestsError(said["fault"])
    return Verdict(tuple(said["passed"]), "done")


class Inmate:
    """A process in a sandbox, with one end of ``channel``.

    It waits for ``go`` before it runs what is not ours; leaving ends it.
    """

    def __init__(self, kind: Kind, channel: socket.socket, job: Mapping[str, Any]) -> None:
        self.control, theirs = socket.socketpair()
        job = {**job, "kind": kind, "folder": os.getcwd() if kind == "none" else "/tmp"}
        job |= {"command": _bubblewrap(job)} if kind == "bubblewrap" else {}
        with theirs:
            NURSERY.order(theirs, channel)
        self.control.settimeout(_START_SECONDS)
        for _ in range(2 if kind == "bubblewrap" else 1):
            try:
                send(self.control, job, _JOB_BYTES)
            except Hangup:
                return  # wait_until_ready says so

    def wait_until_ready(self, deadline: float) -> None:
        try:
            said = self.hear(deadline)
        except TimeoutError as error:
            raise SandboxError(f"not ready after {_START_SECONDS:g} s") from error
        except (Hangup, NotPlain) as error:
            raise SandboxError(f"ended before it was ready: {error}") from error
        if "failed" in said:
            raise SandboxError(said["failed"])

    def go(self) -> None:
        """Where it has died meanwhile, the missing verdict says so."""
        try:
            send(self.control, {"go": True}, _JOB_BYTES)
        except Hangup:
            return

    def hear(self, deadline: float) -> dict[str, Any]:
        """Its next message. Raises TimeoutError at the deadline, Hangup when it has ended."""
        self.control.settimeout(max(deadline - time.monotonic(), 0.001))
        return receive(self.control, _JOB_BYTES)

    def __enter__(self) -> Inmate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Init sees that nothing more will come and ends all others; the launcher, which waits for
        that, hangs up last.
        """
        with self.control:
            try:
                self.control.shutdown(socket.SHUT_WR)
                deadline = time.monotonic() + _STOP_SECONDS
                while True:
                    self.hear(deadline)
            except (Hangup, OSError):
                return
            except (TimeoutError, NotPlain):
                NURSERY.close()


class Nursery:
    """The process that starts all others, made when first needed: it has imported what they need, and
    forks in a millisecond.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._lock = threading.Lock()

    def order(self, control: socket.socket, channel: socket.socket) -> None:
        """Raises SandboxError where it does not start."""
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._orders is None:
                self._start()
            assert self._orders is not None
            try:
                socket.send_fds(self._orders, [b"+"], [control.fileno(), channel.fileno()])
            except OSError as error:
                raise SandboxError(f"the process that starts sandboxes is gone: {error}") from error

    def close(self) -> None:
        """Ends it and, as each dies with its parent, everything that it has started."""
        with self._lock:
            if self._process is not None and self._orders is not None:
                self._process.kill()
                self._process.wait()
                self._orders.close()
                self._process = self._orders = None

    def _start(self) -> None:
        self._orders, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*_python("nursery(int(sys.argv[2]))"), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_ENVIRONMENT,
            )


NURSERY = Nursery()


def _python(call: str) -> list[str]:
    """The command that calls something of start.py, without the rest of this package or what is installed."""
    return [os.path.realpath(sys.executable), "-s", "-S", "-P", "-c", _START + call, str(_HERE)]


def _bubblewrap(job: Mapping[str, Any]) -> list[str]:
    """The command that does as start.py does by itself otherwise.

    Process 1 is ours: it ends all when the grader hangs up.
    """
    inner = _python("wrapped(int(sys.argv[2]), int(sys.argv[3]))")
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--as-pid-1",
        "--cap-drop",
        "ALL",
    ]
    for path in (f"/dev/{name}" for name in DEVICES):
        command += ["--dev-bind", path, path]
    for path in [*job["readable"], str(_HERE / "inside")]:
        command += ["--ro-bind", path, path]
    for path, target in job["links"].items():
        command += ["--symlink", target, path]
    return [
        *command,
        "--size",
        str(job["file_bytes"]),
        "--perms",
        "1777",
        "--tmpfs",
        "/tmp",
        "--remount-ro",
        "/",
        "--",
        *inner,
    ]
