"""The controller: a process beside rank 0 that draws, samples, grades and keeps the completions of a step.

The learner's interpreter lock and garbage collection never keep a worker waiting. Only the controller and
rank 0 talk to workers: the controller asks for completions, rank 0 sends weights. The other ranks join
gathers. What crosses the socket to rank 0 are small messages, and a step's completions as arrays.

Rank 0 asks ``(name, arguments)``. The controller answers ``("result", value)`` or ``("error", error)``;
before that it may say ``("begin", whom, what)`` and ``("end",)`` around a wait, which rank 0's deadline then
limits, and ``("admit",)``: a worker waits for weights, and goes on after ``("admitted", ())``.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from torch import Tensor

from rltrain.process import Process
from rltrain.protocols import WorkersGone
from rltrain.rollout.packed import PackedGroups, pack_groups, unpack_groups
from rltrain.rollout.pool.pool import ADMIT
from rltrain.rollout.source import Rollouts
from rltrain.types.samples import PolicyVersion, Prompt, Sampling, ScoredGroup
from rltrain.watchdog import Deadline, no_deadline

__all__ = [
    "ControlledRollouts",
    "Controller",
    "ControllerGone",
    "RemoteDeadline",
    "answer_calls",
    "end_with_parent",
    "pack_rollouts",
    "sendable",
    "start_process",
]

_GRACE_SECONDS = 30.0  # in which a controller ends its workers


class ControllerGone(WorkersGone):
    """The controller's process has ended, and its local workers with it."""


# rank 0's side ----------------------------------------------------------------------------------------------


def start_process(module: str, setup: object) -> tuple[subprocess.Popen[bytes], Connection]:
    """``python -m module FD`` with ``setup`` as the first message on its socket. It ends with this process,
    when its standard input does.
    """
    here, there = socket.socketpair()
    with there:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(there.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[there.fileno()],
            start_new_session=True,  # a Ctrl-C is the learner's to handle
        )
    connection = Connection(here.detach())
    connection.send_bytes(pickle.dumps(setup, protocol=5))
    return process, connection


@dataclass
class Controller:
    """The running process, on rank 0. deadline: of every wait for it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: Deadline = no_deadline
    is_gone: bool = False
    is_asked: bool = False  # something that has not been answered
    _waits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a call during which no worker asks for weights. Raises what it raised."""
        self.ask(name, *arguments)
        kind, value = self.wait()
        if kind == "error":
            raise value
        return value

    def ask(self, name: str, *arguments: Any) -> None:
        try:
            self.connection.send((name, arguments))
            self.is_asked = True
        except OSError:
            self.is_gone = True

    def wait(self) -> tuple[str, Any]:
        """("result", value), ("error", error) or (ADMIT, None)."""
        while True:
            with self.deadline("the controller", "to go on"):
                kind, *values = self._receive()
            if kind == "begin":
                self._waits.enter_context(self.deadline(*values))
            elif kind == "end":
                self._waits.pop_all().close()
            else:
                self.is_asked = False
                return kind, values[0] if values else None

    def _receive(self) -> tuple[Any, ...]:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.is_gone = True
        self._waits.pop_all().close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_SECONDS)
        return (
            "error",
            ControllerGone(f"the controller's process ended with exit code {self.process.poll()}"),
        )

    def close(self) -> None:
        """Ends the process and the workers that it started, which do not finish what they still sample. A
        second call does nothing.
        """
        if self.connection.closed:
            return
        if not (self.is_gone or self.is_asked):
            self.ask("close")
            self.wait()
        self.connection.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class WeightGate(Protocol):
    """The part of the learner's engine that sends weights to workers that come in the middle of a step."""

    name: str
    version: PolicyVersion | None

    def admit(self, policy: PolicyVersion) -> None: ...

    def close(self) -> None: ...


@dataclass
class ControlledRollouts:
    """Implements ``RolloutSource``. controller: on rank 0; None elsewhere. known: every prompt by id.

    verify, put_to_sleep: see ``ColocatedRollouts``. prompts: those that it trains on.
    """

    controller: Controller | None
    engine: WeightGate
    process: Process
    prompts: Sequence[Prompt]
    known: Mapping[str, Prompt]
    verify: Callable[[], None]
    put_to_sleep: Callable[[], None]
    state: dict[str, Any]

    def take(self, step: int, version: int) -> Rollouts:
        return self.ask(step, version)()

    def ask(self, step: int, version: int) -> Callable[[], Rollouts]:
        """``take`` in two parts: when this returns, the controller samples; what it returns waits, and joins
        the pushes to workers that came meanwhile. Nothing else may be asked for in between.
        """
        self._send("take", step, version, policy=version)

        def wait() -> Rollouts:
            packed, self.state = self._wait(version)
            self.verify()
            return unpack_rollouts(packed, self.known)

        return wait

    def settle(self) -> None: ...

    def release_memory(self) -> None:
        self.put_to_sleep()

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        ids = [prompt.id for prompt in prompts]
        packed = self._ask("evaluate", ids, sampling, version, occasion, policy=version)
        return unpack_groups(packed, self.known)

    def _ask(self, name: str, *arguments: Any, policy: PolicyVersion) -> Any:
        self._send(name, *arguments, policy=policy)
        return self._wait(policy)

    def _send(self, name: str, *arguments: Any, policy: PolicyVersion) -> None:
        if self.engine.version != policy:
            raise RuntimeError(f"asked for version {policy}, and the workers hold {self.engine.version}")
        if self.controller is not None:
            self.controller.ask(name, *arguments)

    def _wait(self, policy: PolicyVersion) -> Any:
        """The result on every rank; meanwhile all of them join the pushes to workers that come."""
        while True:
            event = [] if self.controller is None else [self.controller.wait()]
            self.process.meet()
            kind, value = self.process.gather(event)[0]
            if kind == "error":
                raise value
            if kind != ADMIT:
                return value
            self.engine.admit(policy)
            if self.controller is not None:
                self.controller.ask("admitted")

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        """The controller adapts to the metrics; nothing adapts to single tokens on servers."""
        del entropy, sampled
        if self.controller is not None and not self.controller.is_gone:
            self.state = self.controller.call("observe", dict(metrics))

    def state_dict(self) -> dict[str, Any]:
        """As it was after the last step, also where the controller has ended since."""
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)
        if self.controller is not None and not self.controller.is_gone:
            self.controller.call("load_state_dict", self.state)

    def close(self) -> None:
        self.engine.close()
        if self.controller is not None:
            with self.process.deadline("the controller", "to close"):
                self.controller.close()


def pack_rollouts(rollouts: Rollouts, known: Mapping[str, Prompt]) -> tuple[PackedGroups, dict[str, Any]]:
    others = {name: value for name, value in vars(rollouts).items() if name != "groups"}
    return pack_groups(rollouts.groups, known), others


def unpack_rollouts(packed: tuple[PackedGroups, dict[str, Any]], known: Mapping[str, Prompt]) -> Rollouts:
    groups, others = packed
    return Rollouts(groups=tuple(unpack_groups(groups, known)), **others)


# the controller's side --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteDeadline:
    """A ``Deadline`` that rank 0 keeps."""

    connection: Connection

    @contextlib.contextmanager
    def __call__(self, whom: str, what: str) -> Iterator[None]:
        self.connection.send(("begin", whom, what))
        try:
            yield
        finally:
            self.connection.send(("end",))


def answer_calls(
    connection: Connection, calls: Mapping[str, Callable[..., Any]], until: Sequence[str]
) -> None:
    """Answers rank 0's calls until it makes one of ``until``, or is gone."""
    while True:
        name, arguments = connection.recv()
        if name in until:
            return
        try:
            answer = ("result", calls[name](*arguments))
        except (RuntimeError, ValueError, OSError, LookupError, TypeError, ArithmeticError) as error:
            answer = ("error", sendable(error))
        connection.send(answer)


def sendable(error: Exception) -> Exception:
    """The error, or what it says where it cannot cross a socket."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def end_with_parent() -> None:
    """Blocks until the standard input ends, which is when the process that started this one has ended."""
    while os.read(0, 4096):
        pass
    os._exit(1)
