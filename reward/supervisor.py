"""The parent of a grading process: when that ends, or the trainer hangs up, all that it has started ends as
well.

A process group is not enough: a child that calls ``setsid`` leaves it, and once its own parent has gone
nobody knows whose it was. On Linux orphans come to the nearest ancestor that asks for them (a subreaper),
which is this process, so that none is lost; it needs no privilege. Elsewhere it ends the process group.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from reward.inside import kernel

_PATIENCE_SECONDS = 5.0  # for processes that cannot die yet, such as one that waits for a dead disk
_LOOK_SECONDS = 0.002
_LOOK_AT_TRAINER_MS = 1000  # whose end does not show where a process that it forked holds the lifeline too


def supervise(program: str, channel: int, lifeline: int) -> None:
    """Run ``program.main(channel)`` in a child, which alone returns, and end as it ends, after all that it
    started.

    channel: descriptor of the child's end of its socket. lifeline: of another, to whose other end the
    trainer sends something, or closes it, or dies, when all has to end.
    """
    if sys.platform == "linux":
        kernel.adopt_orphans()
    trainer, parent = os.getppid(), os.getpid()
    child = os.fork()
    if child != 0:
        os.close(channel)
        _follow(child, lifeline, trainer)
    os.close(lifeline)
    os.setsid()
    if sys.platform == "linux":
        kernel.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    importlib.import_module(program).main(channel)


def _follow(child: int, lifeline: int, trainer: int) -> NoReturn:
    """Until the child has ended or the trainer has hung up; then to the end of both."""
    awake, wake = socket.socketpair()
    for end in (awake, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(
            number, lambda *_: None
        )  # who stops a job signals all its processes: it is for the child to say
    poll = select.poll()
    poll.register(awake, select.POLLIN)
    poll.register(lifeline, select.POLLIN)
    status: int | None = None
    while status is None:
        events = dict(poll.poll(_LOOK_AT_TRAINER_MS))
        with contextlib.suppress(BlockingIOError):
            awake.recv(4096)
        status, _ = _reaped(child, status)
        if lifeline in events or os.getppid() != trainer:
            break
    _end_as(_end_all(child, status))


def _end_as(status: int) -> NoReturn:
    """With the same exit code, or of the same signal, as a wait status says."""
    if not os.WIFSIGNALED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(1)


def _reaped(child: int, status: int | None) -> tuple[int | None, bool]:
    """The child's status once it has ended, and whether nobody is left. Ended orphans are let go as well."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            status = ended[1] if ended[0] == child else status
    except ChildProcessError:
        return status, True
    return status, False


def _end_all(child: int, status: int | None) -> int:
    """Kills until nobody is left, orphans that come meanwhile included; the child's status."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while time.monotonic() < deadline:
        for process in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        status, alone = _reaped(child, status)
        if alone:
            break
        select.select([], [], [], _LOOK_SECONDS)
    return signal.SIGKILL if status is None else status


def descendants(ancestor: int) -> list[int]:
    """Processes below ``ancestor``, as /proc has them; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    below = list(children.get(ancestor, ()))
    for process in below:
        below += children.get(process, ())
    return below
