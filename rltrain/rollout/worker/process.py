"""A worker on this machine: starts the server's process, watches its start, and ends it for certain."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rltrain.errors import UserError
from rltrain.rollout.worker.flags import Address, WorkerSettings, require_known_version
from rltrain.rollout.worker.guard import TOKEN
from rltrain.rollout.worker.serve import LIFELINE

__all__ = ["LocalWorker", "WorkerDied", "find_free_port", "run_token"]

GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL; a server that still starts does not hear SIGTERM
SILENCE_SECONDS = 300.0  # of the log at the start, after which the server counts as stuck
_POLL_SECONDS = 0.2
_PREFIX = "rltrain-worker-"  # of the folders of servers' sockets and logs
_LOCK = "lock"
_TAIL = 25  # lines of the log in an error
_ERROR_LINE = re.compile(r"(?:^|\s)(?:[A-Za-z_.]+(?:Error|Exception)): .+")


class WorkerDied(UserError):
    """The server's process ended, or did not start."""


class LocalWorker:
    """A server's process in a process group of its own. Every method may be called from any thread.

    log: file that receives what the server prints; None: in a folder of its own, gone after ``close``.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        address: Address | None = None,
        token: str = "",
        log: Path | None = None,
    ) -> None:
        require_known_version()
        remove_left_folders()
        self._folder, lock = make_locked_folder()
        self._lock: int | None = lock
        if settings.adapter_rank is not None and settings.adapter_folder is None:
            settings = replace(settings, adapter_folder=self._folder / "adapters")
        self.settings = settings
        self.address = address or Address(socket=self._folder / "socket")
        self.token = token or run_token()
        _remove_stale_socket(self.address)
        self.log = log or self._folder / "log"
        command = [sys.executable, "-m", "rltrain.rollout.worker.serve", *settings.flags(self.address)]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # it ends where this pipe does
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**settings.environment(self.token), LIFELINE: str(self._folder)},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the server's process, which leads its group."""
        return self._process.pid

    def wait_until_serving(
        self, silence_seconds: float = SILENCE_SECONDS, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Returns when the server answers.

        Raises WorkerDied when its process ends, and when its log stays silent for ``silence_seconds``: a
        start takes half a minute on an idle machine and minutes on a busy one, so that only progress tells a
        slow start from a stuck one.
        """
        size = -1
        since = time.monotonic()
        while not self._is_healthy():
            if should_stop():
                raise WorkerDied("the worker was told to stop while it started")
            if self._process.poll() is not None:
                code = self._process.returncode
                raise WorkerDied(
                    f"the vLLM server ended at its start, {_describe_exit(code)}{self._reason()}"
                )
            if size != (size := self.log.stat().st_size):
                since = time.monotonic()
            if time.monotonic() - since > silence_seconds:
                raise WorkerDied(
                    f"the vLLM server has neither answered nor written to its log for {silence_seconds:g} s; "
                    f"raise rollout.server.silence_seconds if it may{self._reason()}"
                )
            time.sleep(_POLL_SECONDS)

    def require_alive(self) -> None:
        """Raises WorkerDied if the server's process has ended."""
        code = self._process.poll()
        if code is not None:
            raise WorkerDied(f"the vLLM server ended, {_describe_exit(code)}{self._reason()}")

    def wait(self) -> int:
        """Waits for the process's end; returns its exit code."""
        return self._process.wait()

    def close(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Ends the process group: SIGTERM, then SIGKILL for what is left. A second call does nothing."""
        if self._process.poll() is None:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_seconds)
        # the group outlives its leader as long as one of vLLM's processes lives
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def kill(self) -> None:
        """Ends the process group at once."""
        self._signal_group(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks the server to end; ``close`` makes sure of it."""
        self._signal_group(signal.SIGTERM)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _is_healthy(self) -> bool:
        try:
            connection = _connect(self.address)
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            finally:
                connection.close()
        except (OSError, http.client.HTTPException):
            return False

    def _reason(self) -> str:
        """The last error in the log, and the lines around it."""
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            tail = list(deque(lines, maxlen=400))
        tail = [line.rstrip().replace(self.token, f"<{TOKEN}>") for line in tail]
        errors = [match.group().strip() for line in tail if (match := _ERROR_LINE.search(line))]
        cause = f": {errors[-1]}" if errors else ""
        return "\n".join([cause, f"the last lines of {self.log}:", *tail[-_TAIL:]])


def make_locked_folder() -> tuple[Path, int]:
    """A folder that only this user may enter, and the lock in it, which this process holds while it lives."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(folder / "new", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / _LOCK)  # nobody finds it before it is locked
    return folder, lock


def remove_left_folders() -> None:
    """Removes this user's folders whose process was killed together with its server: a server that outlives
    its starter removes the folder itself.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:  # another user's, or one that is being made or removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5.0)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _connect(address: Address) -> http.client.HTTPConnection:
    if address.socket is not None:
        return _UnixConnection(address.socket)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    if address.tls is None:
        return http.client.HTTPConnection(host, address.port, timeout=5.0)
    # its own certificate, on its own machine: nothing is sent and nothing is believed but the status
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if address.tls.clients is not None:
        context.load_cert_chain(address.tls.certificate, address.tls.key)
    return http.client.HTTPSConnection(host, address.port, timeout=5.0, context=context)


def _remove_stale_socket(address: Address) -> None:
    """Removes the socket that a killed server left behind. Raises UserError where one still listens."""
    if address.socket is None or not address.socket.is_socket():
        return
    try:
        _UnixConnection(address.socket).connect()
    except ConnectionRefusedError:
        address.socket.unlink()
    else:
        raise UserError(f"a server listens at {address.socket} already; choose another --socket")


def _describe_exit(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def find_free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def run_token() -> str:
    """The token in the environment, or a new one."""
    return os.environ.get(TOKEN) or secrets.token_urlsafe(32)
