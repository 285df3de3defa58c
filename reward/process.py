"""The trainer's end of a grading process: start it, give it a task, read its reply, kill it with all
that it started.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reward.output import OutputLog
from reward.received import MalformedAnswerError, received
from reward.reply import LARGEST, LENGTH, Reply
from reward.score import RewardInputs
from reward.worker import Order, Setup, frame

_END_SECONDS = 10.0  # for the supervisor to end all that its child has started
_SEND_SECONDS = 10.0  # an idle worker reads at once


@dataclass(frozen=True)
class Task:
    """One function on some completions of one prompt."""

    call: int
    group: int
    rows: tuple[int, ...]  # which of the group's completions
    inputs: RewardInputs  # of these rows only
    alone: bool = False  # the last attempt: a failure is this completion's own

    def split(self) -> list[Task]:
        """The same, one completion each."""
        return [
            Task(self.call, self.group, (row,), only(self.inputs, position), alone=True)
            for position, row in enumerate(self.rows)
        ]


def only(inputs: RewardInputs, row: int) -> RewardInputs:
    """One completion of a prompt's."""
    kept = slice(row, row + 1)
    return dataclasses.replace(
        inputs,
        completions=inputs.completions[kept],
        token_counts=inputs.token_counts[kept],
        finish=inputs.finish[kept],
        episodes=inputs.episodes[kept],
        completion_ids=inputs.completion_ids[kept],
    )


class Child:
    """A process that runs ``program.main`` on one end of a socket, under its supervisor, and the other end.

    ``setup`` is the first message. ``process`` is the supervisor, which ends as the program does. output:
    follows what the process prints; None: nobody does.
    """

    def __init__(self, program: str, setup: object, output: OutputLog | None = None) -> None:
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = socket.socketpair()
        printed = None if output is None else os.pipe()
        sink = subprocess.DEVNULL if printed is None else printed[1]
        code = (
            "import sys; from reward.supervisor import supervise; supervise(sys.argv[1], int(sys.argv[2]), "
            "int(sys.argv[3]))"
        )
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs, lifeline:
            self.process = subprocess.Popen(
                # -P: a package called reward in the current folder is not ours
                [sys.executable, "-P", "-c", code, program, str(theirs.fileno()), str(lifeline.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                pass_fds=(theirs.fileno(), lifeline.fileno()),
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        if output is not None and printed is not None:
            os.close(printed[1])
            output.follow(printed[0])
        self.socket, self.buffer = ours, bytearray()
        self._program: Path | None = None  # its folder in /proc
        self.begins()
        self.send(setup)

    def send(self, message: object) -> bool:
        self.socket.settimeout(_SEND_SECONDS)
        try:
            self.socket.sendall(frame(message))
        except OSError:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next whole message, or None until there is one. Does not block; asked until it says None, it
        leaves nothing behind.

        Raises MalformedAnswerError where what arrives cannot be the length of a message.
        """
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # nothing there, or dead: has_died sees that
            self.buffer += self.socket.recv(1 << 20)
        if len(self.buffer) < LENGTH.size:
            return None
        (size,) = LENGTH.unpack_from(self.buffer)
        if size > LARGEST:
            raise MalformedAnswerError(f"it begins with {bytes(self.buffer[:60])!r}")
        if len(self.buffer) < LENGTH.size + size:
            return None
        message = bytes(self.buffer[LENGTH.size : LENGTH.size + size])
        del self.buffer[: LENGTH.size + size]
        return message

    def begins(self) -> None:
        """Something new, from which ``seconds`` count."""
        self._since, self._queued = time.monotonic(), self._seconds_queued()

    def seconds(self) -> float:
        """On the wall clock since it began what it is doing."""
        return time.monotonic() - self._since

    def is_late(self, limit: float) -> bool:
        """Whether ``seconds`` without its waits for a CPU are more than ``limit``: the machine's load fails nobody."""
        seconds = self.seconds()
        return seconds > limit and seconds - (self._seconds_queued() - self._queued) > limit

    def _seconds_queued(self) -> float:
        """For how long the program's main thread has been ready to run while others had the CPUs; 0 where the system does
        not say."""
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
        """Without reaping it: until then its number is nobody else's."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> str:
        """Ends it with all that it has started, whatever session that is in; closes the socket; how
        it ended, in words.
        """
        with self._lifeline, contextlib.suppress(OSError):  # nobody reads where it has ended
            self._lifeline.send(b".")  # a hangup alone goes unseen where the trainer has forked
        self.socket.close()
        try:
            code = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # stopped by somebody, or held by a process that cannot die
            self.process.kill()
            code = self.process.wait()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class WorkerProcess(Child):
    """One grading process and what it is doing: starting (not ready), idle, or grading the first of
    ``tasks``.
    """

    def __init__(self, setup: Setup, output: OutputLog) -> None:
        self.ready = False
        self.tasks: collections.deque[Task] = collections.deque()
        self._number = secrets.randbelow(1 << 32)  # of the first of ``tasks``
        super().__init__("reward.worker", setup, output)

    def take(self, tasks: Sequence[Task]) -> bool:
        """False where the worker is dead or does not read; none of ``tasks`` is then begun. Only for an idle
        worker: while it grades nobody writes to it, so that neither end waits for the other to read."""
        if not self.send(
            [
                Order.of(number, task.call, task.inputs)
                for number, task in enumerate(tasks, start=self._number)
            ]
        ):
            return False
        self.tasks.extend(tasks)
        self.begins()
        return True

    def reply(self) -> Reply | None:
        """The next answer, or None until there is one.

        Raises MalformedAnswerError where it is not one to the task in hand.
        """
        body = self.receive()
        if body is None:
            return None
        reply = received(Reply, body)
        if not self.ready:
            return reply
        rows = len(self.tasks[0].rows) if self.tasks else None
        answers = rows is not None and reply.task == self._number
        whole = bool(reply.reason) if reply.scores is None else len(reply.scores) == rows
        if not (answers and whole):
            raise MalformedAnswerError("it is not to the task in hand, or not of its length")
        return reply

    def done(self) -> tuple[Task, float]:
        """The task that a reply belongs to, and the seconds it took; the next one begins."""
        seconds, self._number = self.seconds(), self._number + 1
        self.begins()
        return self.tasks.popleft(), seconds
