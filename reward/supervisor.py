"""The parent of a grading process: when that process ends, or the trainer hangs up, the supervisor ends every
process that it has started.

A process group is not enough: a child that calls ``setsid`` leaves it, and can no longer be attributed once
its own parent has ended. On Linux, orphans become children of the nearest ancestor that asks for them (a
subreaper), which is this process, so that none is lost; this needs no privilege. On other systems the
supervisor ends the process group only.
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

from rltrain.reward.inside import kernel

_PATIENCE_SECONDS = 5.0  # for processes that cannot end yet, such as one that waits for a dead disk
_POLL_SECONDS = 0.002
# The trainer's end does not close the lifeline if a process that it forked holds the lifeline too.
_TRAINER_POLL_MS = 1000


def supervise(program: str, channel: int, lifeline: int) -> None:
    """Runs ``program.main(channel)`` in a child, and exits with the child's status after ending every process
    that the child started. The function returns only in the child.

    channel: descriptor of the child's end of its socket. lifeline: descriptor of a second socket; when the
    trainer sends on its other end, closes it, or dies, everything ends.
    """
    if sys.platform == "linux":
        kernel.adopt_orphans()
    trainer = os.getppid()
    parent = os.getpid()
    child = os.fork()
    if child != 0:
        os.close(channel)
        _wait_for_end(child, lifeline, trainer)
    os.close(lifeline)
    os.setsid()
    if sys.platform == "linux":
        kernel.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    importlib.import_module(program).main(channel)


def _wait_for_end(child: int, lifeline: int, trainer: int) -> NoReturn:
    """Waits until the child has ended or the trainer has hung up, then ends all processes and exits."""
    awake, wake = socket.socketpair()
    for end in (awake, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A job scheduler signals all processes of a job: the child decides how to react.
        signal.signal(number, lambda *_: None)
    poll = select.poll()
    poll.register(awake, select.POLLIN)
    poll.register(lifeline, select.POLLIN)
    status: int | None = None
    while status is None:
        events = dict(poll.poll(_TRAINER_POLL_MS))
        with contextlib.suppress(BlockingIOError):
            awake.recv(4096)
        status, _ = _reap_children(child, status)
        if lifeline in events or os.getppid() != trainer:
            break
    _exit_with_status(_end_all(child, status))


def _exit_with_status(status: int) -> NoReturn:
    """Exits with the exit code of a wait status, or dies by its signal."""
    if not os.WIFSIGNALED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(1)


def _reap_children(child: int, status: int | None) -> tuple[int | None, bool]:
    """Reaps ended children and orphans: the child's status once it has ended, and whether no process is
    left."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            status = ended[1] if ended[0] == child else status
    except ChildProcessError:
        return status, True
    return status, False


def _end_all(child: int, status: int | None) -> int:
    """Kills until no process is left, new orphans included; returns the child's status."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while time.monotonic() < deadline:
        for process in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        status, none_left = _reap_children(child, status)
        if none_left:
            break
        select.select([], [], [], _POLL_SECONDS)
    return signal.SIGKILL if status is None else status


def descendants(ancestor: int) -> list[int]:
    """Process numbers of the descendants of ``ancestor`` in /proc; empty if there is no /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    processes = list(children.get(ancestor, ()))
    for process in processes:
        processes += children.get(process, ())
    return processes
