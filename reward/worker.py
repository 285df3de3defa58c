"""A grading process: started by pool.py with one end of a socket, grades until the other end closes.

It is executed, not forked, so nothing of the trainer (torch, CUDA, threads) is in it. It leads its own
process group, which dies with it. What the trainer sends is pickled, since columns may hold anything; what a
worker answers is JSON (``reply.py``), since a grader, or whoever takes it over, can write to the socket too.
Each task is unpickled by itself: nothing of it is another grader's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any

from reward.caught import Caught
from reward.output import mark
from reward.reply import LENGTH, GraderFacts, Reply, encoded, framed
from reward.resolve import Grader, RewardCall, resolve
from reward.score import RewardInputs, Score
from reward.score_checks import ContractError


@dataclass(frozen=True)
class Setup:
    """The first message to a worker."""

    calls: tuple[RewardCall, ...]
    seconds: float
    memory_bytes: int  # of address space
    nonce: str = ""  # of the marks in what the worker prints


@dataclass(frozen=True)
class Order:
    """One task as it travels. ``task`` is a number that no grader is told; the reply repeats it."""

    task: int
    call: int
    packed: bytes  # pickled RewardInputs

    @classmethod
    def of(cls, task: int, call: int, inputs: RewardInputs) -> Order:
        return cls(task, call, pickle.dumps(inputs, protocol=pickle.HIGHEST_PROTOCOL))


def frame(message: Any) -> bytes:
    """A message of the trainer's to a process that it has started."""
    return framed(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def main(descriptor: int) -> None:
    outlive_sigterm()
    channel = socket.socket(fileno=descriptor)
    stream = channel.makefile("rb")
    threading.Thread(target=die_with_the_trainer, args=(descriptor,), daemon=True).start()
    setup: Setup = read(stream)
    print_by_lines()
    graders: list[Grader] = []
    with Caught() as caught:
        limit(resource.RLIMIT_AS, setup.memory_bytes)
        graders = _graders(setup.calls)
    if caught.error is not None:
        channel.sendall(encoded(Reply(reason="error", message=_why_no_start(caught))))
        return
    channel.sendall(
        encoded(Reply(graders=tuple(GraderFacts(grader.scope, grader.reads_ids) for grader in graders)))
    )
    own_process = os.getpid()
    while True:
        for order in read(stream):
            bound_cpu_time(setup.seconds)
            reply = dataclasses.replace(_carried_out(order, graders, setup.nonce), task=order.task)
            if os.getpid() != own_process:
                os._exit(0)  # a child that the grader forked and forgot
            flush()
            mark(1, setup.nonce)
            channel.sendall(
                encoded(reply)
            )  # each at once, so that the pool knows which task a death or a delay belongs to


def _carried_out(order: Order, graders: list[Grader], nonce: str) -> Reply:
    inputs: RewardInputs = pickle.loads(order.packed)
    grader = graders[order.call]
    mark(1, nonce, ", ".join(filter(None, (inputs.occasion, grader.label))))
    return grade(grader, inputs)


def grade(grader: Grader, inputs: RewardInputs) -> Reply:
    """The grader's scores, or why there are none."""
    scores: list[Score] | None = None
    with Caught() as caught:
        scores = grader(inputs)
    if caught.error is None:
        return Reply(scores=scores)
    if isinstance(caught.error, MemoryError):
        return Reply(reason="memory", message="MemoryError: over the limit reward.memory_gib")
    if isinstance(caught.error, ContractError):
        return Reply(reason="contract", message=str(caught.error)[:2000])
    return Reply(reason="error", message=str(caught)[:2000])


def print_by_lines() -> None:
    """What is printed is in the pipe even where the process is killed a moment later."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed or replaced by a grader
            stream.flush()


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
    """A last resort for a loop inside one C call whose trainer is gone: far beyond what the pool
    itself allows.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = used.ru_utime + used.ru_stime + 60 + 2 * seconds * (os.cpu_count() or 1)
    limit(resource.RLIMIT_CPU, int(allowed))


def limit(kind: int, value: int) -> None:
    """This process's soft limit, within the hard one it was started with."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def outlive_sigterm() -> None:
    """Who stops a job signals all its processes, but the trainer finishes the step in hand, and that needs
    this one. What is executed from here does not inherit it, as it would if the signal were ignored."""
    signal.signal(signal.SIGTERM, lambda *_: None)


def die_with_the_trainer(descriptor: int) -> None:
    """Waits for the other end of the socket to hang up (the trainer closed it or was killed) and ends
    the whole process group.
    """
    hangup = select.poll()
    hangup.register(descriptor, 0)
    hangup.poll()
    os.killpg(0, signal.SIGKILL)
