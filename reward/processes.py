"""Killable processes and their pool, as the trainer sees them: start, answers, deadlines, death, replacement.

A process runs code that the trainer does not trust; its failure costs what it was busy with, never the run.
The trainer sends pickles, a process answers in JSON (``channel.py`` is its end of the socket). The users of
the pool say what a process is busy with and what follows from its loss: ``pool.py`` for graders,
``rltrain/rollout/environments/pool.py`` for environments.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rltrain.reward.output import OutputLog
from rltrain.reward.received import MalformedAnswerError
from rltrain.reward.reply import LARGEST, LENGTH, add_length

__all__ = ["Child", "Loss", "MalformedAnswerError", "ProcessPool"]

_POLL_MS = 50  # a death that the socket does not show (a forked child holds it open) is noticed this late
_END_SECONDS = 10.0  # for the supervisor to end everything that its child has started
_SEND_SECONDS = 10.0  # an idle process reads immediately
_START = (
    "import sys; from rltrain.reward.supervisor import supervise; "
    "supervise(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class Loss:
    """Why a process has to be replaced."""

    reason: str  # "timeout", "died" or "malformed"
    message: str


class Child(ABC):
    """The trainer's end of a process that runs ``program.main`` under a supervisor (``supervisor.py``).

    setup: the first message. output: reads what the process prints; None: that is discarded. ``process`` is
    the supervisor, which ends as the program does.
    """

    is_ready = False  # its first answer has been accepted

    def __init__(self, program: str, setup: object, output: OutputLog | None = None) -> None:
        self.socket, program_end = socket.socketpair()
        lifeline, self._lifeline = socket.socketpair()
        pipe = None if output is None else os.pipe()
        sink = subprocess.DEVNULL if pipe is None else pipe[1]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)

        with program_end, lifeline:
            descriptors = (program_end.fileno(), lifeline.fileno())
            self.process = subprocess.Popen(
                # -P: the child searches where the trainer searches, and the current folder only if it does
                [sys.executable, "-P", "-c", _START, program, *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                pass_fds=descriptors,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        if output is not None and pipe is not None:
            os.close(pipe[1])
            output.follow(pipe[0])

        self._buffer = bytearray()
        self._program: Path | None = None  # its folder in /proc
        self.restart_clock()
        self.send(setup)

    @abstractmethod
    def read_answer(self) -> Any:
        """The next answer, or None until there is one. Raises MalformedAnswerError where a message is not an
        answer to the latest request."""

    @property
    @abstractmethod
    def time_limit(self) -> float | None:
        """Seconds for what it is doing; None: no limit."""

    @property
    def is_awaited(self) -> bool:
        """Whether the pool reads its answers and watches its time limit and its death."""
        return True

    def send(self, message: object) -> bool:
        """False where the process is dead or does not read."""
        self.socket.settimeout(_SEND_SECONDS)
        try:
            self.socket.sendall(add_length(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)))
        except OSError:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next whole message, or None until there is one. Does not block; after None the socket has been
        read empty.

        Raises MalformedAnswerError where what arrives cannot be the length of a message.
        """
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # empty, or dead: has_died notices that
            self._buffer += self.socket.recv(1 << 20)
        if len(self._buffer) < LENGTH.size:
            return None

        (size,) = LENGTH.unpack_from(self._buffer)
        if size > LARGEST:
            raise MalformedAnswerError(f"it begins with {bytes(self._buffer[:60])!r}")
        if len(self._buffer) < LENGTH.size + size:
            return None

        message = bytes(self._buffer[LENGTH.size : LENGTH.size + size])
        del self._buffer[: LENGTH.size + size]
        return message

    def restart_clock(self) -> None:
        """The process begins something new, to which ``time_limit`` applies."""
        self._start = time.monotonic()
        self._queued_at_start = self._queued_seconds()

    def elapsed_seconds(self) -> float:
        """On the wall clock since the process began what it is doing."""
        return time.monotonic() - self._start

    def is_late(self) -> bool:
        """Whether ``elapsed_seconds`` without waits for a CPU exceed ``time_limit``: the machine's load makes
        nothing late."""
        limit = self.time_limit
        if limit is None:
            return False
        seconds = self.elapsed_seconds()
        return seconds > limit and seconds - (self._queued_seconds() - self._queued_at_start) > limit

    def _queued_seconds(self) -> float:
        """For how long the program's main thread has been ready to run while others had the CPUs; 0 where the
        system does not tell."""
        try:
            if self._program is None:
                supervisor = Path(f"/proc/{self.process.pid}")
                children = (supervisor / f"task/{self.process.pid}/children").read_text().split()
                if not children:
                    return 0.0
                self._program = supervisor.with_name(children[0])  # the oldest; orphans come after it
            return int((self._program / "schedstat").read_text().split()[1]) * 1e-9
        except (OSError, IndexError, ValueError):
            return 0.0

    def has_died(self) -> bool:
        """Does not reap the process: until then no other process has its number."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> str:
        """Ends the process and everything that it has started, in whatever session; closes the socket.
        Returns how the process ended, in words."""
        with self._lifeline, contextlib.suppress(OSError):  # the supervisor has ended
            self._lifeline.send(b".")  # a hangup alone goes unnoticed where the trainer has forked
        self.socket.close()
        try:
            code = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # stopped by a signal, or held by a process that cannot die
            self.process.kill()
            code = self.process.wait()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


Worker = TypeVar("Worker", bound=Child)
Answer = TypeVar("Answer")  # of ``Worker.read_answer``


class ProcessPool(Generic[Worker, Answer]):
    """``count`` processes, each made by ``start``; they import in the background."""

    def __init__(self, start: Callable[[], Worker], count: int) -> None:
        self._start = start
        self.workers = [start() for _ in range(count)]
        self.is_closed = False

    def poll(self) -> Iterator[tuple[Worker, Answer | Loss]]:
        """The answers of awaited workers, waiting a moment for them, and losses: workers that are late, dead,
        or not alone in writing to their socket. The caller replaces a lost worker before it goes on."""
        workers = [worker for worker in self.workers if worker.is_awaited]
        inputs = select.poll()
        for worker in workers:
            inputs.register(worker.socket, select.POLLIN)
        descriptors = {descriptor for descriptor, _ in inputs.poll(_POLL_MS)}

        for worker in [worker for worker in workers if worker.socket.fileno() in descriptors]:
            yield from self._read_answers(worker)
        for worker in workers:
            if self._find_loss(worker) is None:
                continue
            yield from self._read_answers(worker)  # it may have answered before we looked
            loss = self._find_loss(worker)
            if loss is not None:
                yield worker, loss

    def replace(self, worker: Worker) -> tuple[Worker, str]:
        """Ends ``worker`` and starts another in its place: the new worker, and how the old worker ended."""
        end = worker.kill()
        successor = self._start()
        self.workers[self.workers.index(worker)] = successor
        return successor, end

    def close(self) -> None:
        """Ends every process and what it has started."""
        if not self.is_closed:
            self.is_closed = True
            for worker in self.workers:
                worker.kill()

    def _read_answers(self, worker: Worker) -> Iterator[tuple[Worker, Answer | Loss]]:
        while self._is_watched(worker):
            try:
                answer = worker.read_answer()
            except MalformedAnswerError as error:
                yield worker, Loss("malformed", f"its process sent what is no answer: {error}")
                return
            if answer is None:
                return
            yield worker, answer

    def _find_loss(self, worker: Worker) -> Loss | None:
        if not self._is_watched(worker):
            return None
        if worker.is_late():
            return Loss("timeout", f"took more than {worker.time_limit:g} s")
        return Loss("died", "its process is gone") if worker.has_died() else None

    def _is_watched(self, worker: Worker) -> bool:
        """Whether it is still awaited: since ``poll`` began, the caller may have replaced it."""
        return worker.is_awaited and worker in self.workers
