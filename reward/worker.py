"""A grading process: started by pool.py with one end of a socket, grades until the other end closes.

It is executed, not forked, so nothing of the trainer (torch, CUDA, threads) is in it. It leads its own process group, which dies
with it. Messages are pickles behind an eight-byte length, between two processes of one user.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from typing import Any

from reward.resolve import Caught, Grader, RewardCall, resolve
from reward.score import RewardInputs, Score

LENGTH = struct.Struct(">Q")


@dataclass(frozen=True)
class Setup:
    """The first message to a worker."""

    calls: tuple[RewardCall, ...]
    seconds: float
    memory_bytes: int  # of address space


@dataclass(frozen=True)
class Reply:
    """``scores`` or, where there are none, ``reason`` ("error", "memory") and ``message``. The first reply has the graders' scopes."""

    scores: list[Score] | None = None
    reason: str = ""
    message: str = ""
    scopes: tuple[str, ...] = ()


def frame(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


def main(descriptor: int) -> None:
    outlive_sigterm()
    channel = socket.socket(fileno=descriptor)
    stream = channel.makefile("rb")
    threading.Thread(target=die_with_the_trainer, args=(descriptor,), daemon=True).start()
    setup: Setup = read(stream)
    graders: list[Grader] = []
    with Caught() as caught:
        limit(resource.RLIMIT_AS, setup.memory_bytes)
        graders = _graders(setup.calls)
    if caught.error is not None:
        channel.sendall(frame(Reply(reason="error", message=_why_no_start(caught))))
        return
    channel.sendall(frame(Reply(scopes=tuple(grader.scope for grader in graders))))
    me = os.getpid()
    while True:
        for index, inputs in read(stream):
            bound_cpu_time(setup.seconds)
            reply = grade(graders[index], inputs)
            if os.getpid() != me:
                os._exit(0)  # a child that the grader forked and forgot
            channel.sendall(frame(reply))  # one by one, so that the pool knows which task a death or a delay belongs to


def grade(grader: Grader, inputs: RewardInputs) -> Reply:
    """The grader's scores, or why there are none."""
    scores: list[Score] | None = None
    with Caught() as caught:
        scores = grader(inputs)
    if caught.error is None:
        return Reply(scores)
    if isinstance(caught.error, MemoryError):
        return Reply(reason="memory", message="MemoryError: over the limit reward.memory_gib")
    return Reply(reason="error", message=str(caught)[:2000])


def _graders(calls: tuple[RewardCall, ...]) -> list[Grader]:
    graders = [resolve(call) for call in calls]
    for grader in graders:
        grader.warm_up()
    return graders


def _why_no_start(caught: Caught) -> str:
    if isinstance(caught.error, MemoryError):
        return "a reward worker cannot even import its graders within reward.memory_gib; raise it"
    return str(caught.error) if isinstance(caught.error, ValueError) else str(caught)


def read(stream: Any) -> Any:
    """The next message. Ends the process where there will be none."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        sys.exit(0)  # the pool has closed
    return pickle.loads(stream.read(LENGTH.unpack(head)[0]))


def bound_cpu_time(seconds: float) -> None:
    """A last resort for a loop inside one C call whose trainer is gone: far beyond what the pool itself allows."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = used.ru_utime + used.ru_stime + 60 + 2 * seconds * (os.cpu_count() or 1)
    limit(resource.RLIMIT_CPU, int(allowed))


def limit(kind: int, value: int) -> None:
    """This process's soft limit, within the hard one it was started with."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def outlive_sigterm() -> None:
    """Who stops a job signals all its processes, but the trainer finishes the step in hand, and that needs this one. What is executed
    from here does not inherit it, as it would if the signal were ignored."""
    signal.signal(signal.SIGTERM, lambda *_: None)


def die_with_the_trainer(descriptor: int) -> None:
    """Waits for the other end of the socket to hang up (the trainer closed it or was killed) and ends the whole process group."""
    hangup = select.poll()
    hangup.register(descriptor, 0)
    hangup.poll()
    os.killpg(0, signal.SIGKILL)
