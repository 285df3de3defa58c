"""A grading process: started by ``pool.py`` with one end of a socket, grades until the other end closes.

Each task is unpickled by itself, so that graders share no objects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import pickle
import sys
from dataclasses import dataclass

from rltrain.reward.caught import Caught
from rltrain.reward.channel import Channel, bound_cpu_time, bound_memory
from rltrain.reward.output import mark
from rltrain.reward.reply import GraderFacts, Reply, encode_reply
from rltrain.reward.resolve import Grader, RewardCall, resolve
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.score_checks import ContractError


@dataclass(frozen=True)
class Setup:
    """The first message to a worker."""

    calls: tuple[RewardCall, ...]
    seconds: float  # for one completion
    memory_bytes: int  # of address space
    nonce: str = ""  # of the marks in what the worker prints


@dataclass(frozen=True)
class Order:
    """One task as it travels. ``task`` is a number that no grader is told; the reply repeats it."""

    task: int
    call: int
    packed: bytes  # pickled RewardInputs

    @classmethod
    def pack(cls, task: int, call: int, inputs: RewardInputs) -> Order:
        return cls(task, call, pickle.dumps(inputs, protocol=pickle.HIGHEST_PROTOCOL))


def main(descriptor: int) -> None:
    channel = Channel(descriptor)
    setup: Setup = channel.receive()
    print_by_lines()
    graders: list[Grader] = []
    with Caught() as caught:
        bound_memory(setup.memory_bytes)
        graders = _load_graders(setup.calls)
    if caught.error is not None:
        channel.send(encode_reply(Reply(reason="error", message=_explain_failed_start(caught))))
        return

    facts = tuple(GraderFacts(grader.scope, grader.reads_ids) for grader in graders)
    channel.send(encode_reply(Reply(graders=facts)))
    while True:
        for order in channel.receive():
            bound_cpu_time(setup.seconds)
            reply = _carry_out(order, graders, setup.nonce)
            channel.exit_if_forked()
            flush()
            mark(1, setup.nonce)
            # Each at once, so that the pool knows which task a death or a delay belongs to.
            channel.send(encode_reply(dataclasses.replace(reply, task=order.task)))


def _carry_out(order: Order, graders: list[Grader], nonce: str) -> Reply:
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
    """Printed lines reach the pipe even where the process is killed a moment later."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed or replaced by a grader
            stream.flush()


def _load_graders(calls: tuple[RewardCall, ...]) -> list[Grader]:
    graders = [resolve(call) for call in calls]
    for grader in graders:
        grader.warm_up()
    return graders


def _explain_failed_start(caught: Caught) -> str:
    # the interpreter says SystemError where its own C code gets no memory, a loader of libraries ENOMEM
    no_memory = isinstance(caught.error, MemoryError | SystemError)
    if no_memory or os.strerror(errno.ENOMEM) in str(caught.error):
        return f"a reward worker cannot even import its graders within reward.memory_gib; raise it ({caught})"
    return str(caught.error) if isinstance(caught.error, ValueError) else str(caught)
