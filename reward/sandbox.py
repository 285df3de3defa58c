"""Runs untrusted Python in a sandbox, next to its tests, which it cannot see.

A program and its tests are two processes, each in a sandbox of its own: without network; with no files except
Python and the system's libraries (read-only) and an empty folder in memory; with limits on all resources; in
its own user, process, mount, network, IPC and host-name namespaces. A sandbox cannot do anything to a file
that another sandbox would notice: locks, leases and watches are refused (so SQLite cannot use files). The two
processes exchange calls and plain data over a socket pair. Only the tests give the verdict, over a channel
that the program does not hold. A program's output is discarded, except with ``run``: then the program gets
only its input, and the expected output stays with the grader.
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

from rltrain.reward.inside.names import DEVICES
from rltrain.reward.inside.wire import Hangup, NotPlain, receive_message, send_message

Kind = Literal["root", "user", "bubblewrap", "none"]

_PACKAGE_FOLDER = Path(__file__).resolve().parent
_START = (
    "import sys; above, package = type(sys)('rltrain'), type(sys)('rltrain.reward'); above.__path__ = []; "
    "package.__path__ = [sys.argv[1]]; sys.modules.update({'rltrain': above, 'rltrain.reward': package}); "
    "from rltrain.reward.inside.start import serve_forks, run_in_bubblewrap; "
)
_START_SECONDS = 20.0  # enough for a machine under load; the program cannot use this time
_STOP_SECONDS = 2.0
_JOB_BYTES = 1 << 26
_SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
_ENVIRONMENT = {
    **{"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
}


@dataclass(frozen=True)
class Limits:
    """Limits for one program and its tests; a program that exceeds one fails."""

    seconds: float  # wall clock, with loading, without starting the sandbox
    memory_mib: int  # address space of each process
    processes: int  # threads included
    file_mib: int  # for one file and for all files together
    message_mib: int  # for one call or answer


@dataclass(frozen=True)
class Tests:
    """Test sources, which run outside the program."""

    __test__ = False  # for pytest: this is not a test class

    sources: tuple[str, ...]
    before: str  # Python that the tests may use
    entry: str | None  # the function that ``check(candidate)`` gets
    module: str = "solution"  # the name under which the tests may import the program


@dataclass(frozen=True)
class Verdict:
    """The tests' verdict on a program."""

    passed: tuple[bool, ...]  # one per test that calls the program
    # "timeout": beyond Limits.seconds; "gone": the tests' process ended without a verdict.
    ended: Literal["done", "timeout", "gone"]


@dataclass(frozen=True)
class RunResult:
    """A program's output and its end."""

    printed: bytes
    # "done": status 0; "failed": another status, or killed; "flood": it printed too much.
    ended: Literal["done", "failed", "timeout", "flood"]
    seconds: float  # from the first line of the program to its end


class SandboxError(Exception):
    """The sandbox failed, not the program in it."""


class TestsError(Exception):
    """The row's tests cannot run, whatever the program."""

    __test__ = False


def judge(source: str, tests: Tests, limits: Limits, kind: Kind, packages: bool = False) -> Verdict:
    """Whether the program ``source`` passes its tests.

    A test is the execution of a test source, and each ``check``, pytest function and unittest method that the
    source defines. A test that passes without calling the program does not count; if none counts, the tests
    are at fault (``rltrain.reward.inside.tester``).

    packages: the program may import the packages installed with this Python, not only the standard library.
    Raises TestsError and SandboxError, neither of which is the program's fault.
    """
    calls, answers = socket.socketpair()
    common_settings = _common_settings(limits, packages)
    tests_settings = {
        "tests": list(tests.sources),
        "before": tests.before,
        "entry": tests.entry,
        "module": tests.module,
    }
    with (
        calls,
        answers,
        SandboxedProcess(kind, calls, {**common_settings, **tests_settings, "role": "tests"}) as tester,
        SandboxedProcess(kind, answers, {**common_settings, "role": "program", "source": source}) as program,
    ):
        calls.close()
        answers.close()
        deadline = time.monotonic() + _START_SECONDS
        for process in (tester, program):
            process.wait_until_ready(deadline)
        for process in (program, tester):
            process.start()
        return _await_verdict(tester, len(tests.sources), limits.seconds)


def run(source: str, stdin: str, limits: Limits, kind: Kind, packages: bool = False) -> RunResult:
    """Runs the program ``source`` alone, with the text ``stdin`` as its standard input. limits.message_mib
    limits its output. Raises SandboxError.
    """
    output, program_end = socket.socketpair()
    job = {**_common_settings(limits, packages), "role": "script", "source": source, "stdin": stdin}
    with output, program_end, SandboxedProcess(kind, program_end, job) as program:
        program_end.close()
        output.shutdown(socket.SHUT_WR)
        program.wait_until_ready(time.monotonic() + _START_SECONDS)
        program.start()
        started = time.monotonic()
        printed = bytearray()
        ended = _collect_output(program, output, printed, limits.message_mib << 20, started + limits.seconds)
        return RunResult(bytes(printed), ended, time.monotonic() - started)


def _collect_output(
    program: SandboxedProcess, channel: socket.socket, printed: bytearray, max_bytes: int, deadline: float
) -> Literal["done", "failed", "timeout", "flood"]:
    """How a program ended; collects its output, about ``max_bytes`` at most, in ``printed``."""
    try:
        while chunk := _receive_chunk(channel, deadline):
            printed += chunk
            if len(printed) > max_bytes:
                return "flood"
        return "done" if program.receive(deadline).get("status") == 0 else "failed"
    except TimeoutError:
        return "timeout"
    except (Hangup, NotPlain):
        return "failed"


def _receive_chunk(channel: socket.socket, deadline: float) -> bytes:
    """The next bytes; empty at the end. Raises TimeoutError at the deadline."""
    seconds_left = deadline - time.monotonic()
    if seconds_left <= 0:
        raise TimeoutError
    channel.settimeout(seconds_left)
    return channel.recv(1 << 16)


def choose_kind(unsandboxed: bool) -> Kind:
    """The kind of sandbox that works on this machine.

    Raises ValueError if none works, unless ``unsandboxed`` allows running without one.
    """
    try:
        return _best_kind()
    except SandboxError as error:
        if unsandboxed:
            return "none"
        raise ValueError(
            f"code cannot be run safely on this machine ({error}). Install bubblewrap (bwrap), or allow "
            "unprivileged user namespaces (in a container: --security-opt seccomp=unconfined, or --cap-add "
            "SYS_ADMIN), or, if the machine itself is disposable, write unsandboxed: true under the reward"
        ) from error


@functools.cache
def _best_kind() -> Kind:
    """The first kind that works.

    Raises SandboxError, which is not cached: the next completion tries again.
    """
    reasons: list[str] = []
    for kind in candidates():
        problem = try_kind(kind)
        if problem is None:
            return kind
        reasons.append(f"{kind}: {problem}")
    raise SandboxError("; ".join(reasons) or f"sandboxes need Linux, this is {sys.platform}")


def candidates() -> list[Kind]:
    """The kinds that may work here, best first. Bubblewrap starts another interpreter (0.2 s) and cannot
    limit the number of files; it is for machines whose kernel grants namespaces only to it."""
    if sys.platform != "linux":
        return []
    bubblewrap: list[Kind] = ["bubblewrap"] if shutil.which("bwrap") else []
    return ["root", "user", *bubblewrap] if os.geteuid() == 0 else ["user", *bubblewrap]


def try_kind(kind: Kind) -> str | None:
    """What is wrong with a kind of sandbox; None if a program in it answers, sees no other processes, and can
    write only in its folder.
    """
    limits = Limits(seconds=10.0, memory_mib=256, processes=1, file_mib=1, message_mib=1)
    tests = Tests(("assert look() == (True, 2, False)",), "", None)
    try:
        verdict = judge(_PROBE, tests, limits, kind)
    except (SandboxError, TestsError, OSError) as error:
        return str(error)
    if verdict.passed == (True,):
        return None
    return "started, but a program in it sees other processes or can write outside its folder"


_PROBE = """
import os

def look():
    open("/tmp/mine", "w").close()
    paths = ("/", "/usr", "/etc", "/dev", "/var/tmp", "/home")
    outside = [path for path in paths if os.access(path, os.W_OK)]
    return os.path.exists("/tmp/mine"), os.getpid(), bool(outside) or os.path.exists("/proc/1")
"""


def _common_settings(limits: Limits, packages: bool) -> dict[str, Any]:
    """The settings that program and tests share."""
    bases = [
        path
        for path in sys.path
        if path and Path(path).is_relative_to(sys.base_prefix) and "-packages" not in path
    ]
    installed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) if packages else []
    readable, links = _visible_paths([*_SYSTEM_PATHS, sys.base_prefix, *installed])
    return {
        "readable": readable,
        "links": links,
        "path": [*bases, *installed],
        "limit": limits.message_mib << 20,
        "memory_bytes": limits.memory_mib << 20,
        "cpu_seconds": int(limits.seconds) + 2,
        "file_bytes": limits.file_mib << 20,
        "processes": limits.processes,
    }


def _visible_paths(paths: Sequence[str]) -> tuple[list[str], Mapping[str, str]]:
    """Files and folders to show, none inside another, and symbolic links to create (``/lib`` is ``usr/lib``
    on most systems).
    """
    existing = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    links = {path: os.readlink(path) for path in existing if os.path.islink(path) and path.count("/") == 1}
    plain = [path for path in existing if path not in links]
    outermost = [
        path
        for path in plain
        if not any(path != other and Path(path).is_relative_to(other) for other in plain)
    ]
    return outermost, links


def _await_verdict(tester: SandboxedProcess, count: int, seconds: float) -> Verdict:
    """The tests' verdict. Only the tests can say that they passed: a missing or malformed message is a
    failure of the program that they called.
    """
    none_passed = (False,) * count
    try:
        message = tester.receive(time.monotonic() + seconds)
    except TimeoutError:
        return Verdict(none_passed, "timeout")
    except (Hangup, NotPlain):
        return Verdict(none_passed, "gone")
    if "fault" in message:
        raise TestsError(message["fault"])
    return Verdict(tuple(message["passed"]), "done")


class SandboxedProcess:
    """A process in a sandbox, with one end of ``channel``.

    It waits for ``start`` before it runs untrusted code; leaving the context ends it.
    """

    def __init__(self, kind: Kind, channel: socket.socket, job: Mapping[str, Any]) -> None:
        self.control, process_end = socket.socketpair()
        job = {**job, "kind": kind, "folder": os.getcwd() if kind == "none" else "/tmp"}
        job |= {"command": _bubblewrap_command(job)} if kind == "bubblewrap" else {}
        with process_end:
            FORK_SERVER.fork(process_end, channel)
        self.control.settimeout(_START_SECONDS)
        for _ in range(2 if kind == "bubblewrap" else 1):
            try:
                send_message(self.control, job, _JOB_BYTES)
            except Hangup:
                return  # wait_until_ready reports it

    def wait_until_ready(self, deadline: float) -> None:
        try:
            message = self.receive(deadline)
        except TimeoutError as error:
            raise SandboxError(f"not ready after {_START_SECONDS:g} s") from error
        except (Hangup, NotPlain) as error:
            raise SandboxError(f"ended before it was ready: {error}") from error
        if "failed" in message:
            raise SandboxError(message["failed"])

    def start(self) -> None:
        """Lets the process run its code. If it has died meanwhile, the missing verdict shows it."""
        try:
            send_message(self.control, {"go": True}, _JOB_BYTES)
        except Hangup:
            return

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message of the process. Raises TimeoutError at the deadline, Hangup after its end."""
        self.control.settimeout(max(deadline - time.monotonic(), 0.001))
        return receive_message(self.control, _JOB_BYTES)

    def __enter__(self) -> SandboxedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closing our side makes init end all other processes; the launcher waits for that and hangs up
        last."""
        with self.control:
            try:
                self.control.shutdown(socket.SHUT_WR)
                deadline = time.monotonic() + _STOP_SECONDS
                while True:
                    self.receive(deadline)
            except (Hangup, OSError):
                return
            except (TimeoutError, NotPlain):
                FORK_SERVER.close()


class ForkServer:
    """The process that forks all sandboxed processes. It starts when it is first needed, imports everything
    that they need, and then forks in a millisecond.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._lock = threading.Lock()

    def fork(self, control: socket.socket, channel: socket.socket) -> None:
        """Forks a process with these two sockets. Raises SandboxError if the fork server does not start."""
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._requests is None:
                self._start()
            assert self._requests is not None
            try:
                socket.send_fds(self._requests, [b"+"], [control.fileno(), channel.fileno()])
            except OSError as error:
                raise SandboxError(f"the process that starts sandboxes is gone: {error}") from error

    def close(self) -> None:
        """Ends the fork server and, because each process dies with its parent, all that it has started."""
        with self._lock:
            if self._process is not None and self._requests is not None:
                self._process.kill()
                self._process.wait()
                self._requests.close()
                self._process = self._requests = None

    def _start(self) -> None:
        self._requests, server_end = socket.socketpair()
        with server_end:
            self._process = subprocess.Popen(
                [*_python_command("serve_forks(int(sys.argv[2]))"), str(server_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(server_end.fileno(),),
                env=_ENVIRONMENT,
            )


FORK_SERVER = ForkServer()


def _python_command(call: str) -> list[str]:
    """The command that calls a function of start.py, without the rest of this package and installed
    packages."""
    return [os.path.realpath(sys.executable), "-s", "-S", "-P", "-c", _START + call, str(_PACKAGE_FOLDER)]


def _bubblewrap_command(job: Mapping[str, Any]) -> list[str]:
    """The command that makes bubblewrap do what start.py does for the other kinds.

    Process 1 runs our code: it ends all processes when the grader hangs up.
    """
    inner = _python_command("run_in_bubblewrap(int(sys.argv[2]), int(sys.argv[3]))")
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
    for path in [*job["readable"], str(_PACKAGE_FOLDER / "inside")]:
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
