"""Environments that misbehave, named in tests as a user's file."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time

from rltrain.reward.reply import add_length, to_json
from rltrain.rollout.environments import Step, Task
from rltrain.rollout.environments.worker import Answer


class Counting:
    """Answers a turn with all that it has heard; done after ``turns``. process: says which one it is in."""

    def __init__(self, *, turns: int = 3, process: bool = False) -> None:
        self.turns, self.process, self.said, self.seed = turns, process, [], 0

    def reset(self, task: Task, seed: int) -> str | None:
        self.said, self.seed = [], seed
        return task.columns.get("opening")

    def step(self, text: str) -> Step:  # noqa: C901  a table
        match text:
            case "sleep":
                time.sleep(600)
            case (
                "daemon"
            ):  # in no session of this process, and its parent has gone; the observation is its number
                return Step(daemon())
            case "raise":
                raise RuntimeError("the environment does not want to")
            case "exit":
                os._exit(3)
            case "memory":
                raise MemoryError
            case "nan":
                return Step(reward=float("nan"))
            case "beyond float32":
                return Step(reward=1e39)
            case "beyond floats":
                return Step(parts={"moves": 10**400})
            case "endless text":
                return Step("x" * 20_000_000)
            case "junk" | "forged" | "pickled" | "huge":
                intrude(text)
            case "nonsense":
                return "not a step"  # type: ignore[return-value]
        self.said.append(text)
        parts = {"seed": float(self.seed)} | ({"process": float(os.getpid())} if self.process else {})
        return Step(" ".join(self.said), len(self.said) == self.turns, 0.5, parts)

    def close(self) -> None:
        if "slow to end" in self.said:
            time.sleep(0.3)
        if "stubborn" in self.said:
            raise RuntimeError("never")


def daemon() -> str:
    """Starts one by forking twice; its process number."""
    told, tell = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            os.write(tell, str(os.getpid()).encode())
            time.sleep(1000)
        os._exit(0)
    os.wait()
    return os.read(told, 20).decode()


def intrude(kind: str) -> None:
    """Writes to the socket of the process what is no answer to its request."""
    sent = {
        "junk": add_length(b"junk"),
        "forged": add_length(to_json(Answer(step=Step(reward=1e6)))),
        "pickled": add_length(pickle.dumps(Answer())),
        "huge": b"\xff" * 64,
    }
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            socket.socket(fileno=os.dup(descriptor)).sendall(sent[kind])


class Unmakeable:
    def __init__(self) -> None:
        raise OSError("no display")


class UnmakeableEnvironment(Unmakeable, Counting):
    """The same with every method that an environment has."""
