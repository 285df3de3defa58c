"""Environments that misbehave, named in tests as a user's file."""

from __future__ import annotations

import os
import time

from rltrain.rollout.environments import Step, Task


class Counting:
    """Answers a turn with all that it has heard; done after ``turns``. process: says which one it is in."""

    def __init__(self, *, turns: int = 3, process: bool = False) -> None:
        self.turns, self.process, self.said, self.seed = turns, process, [], 0

    def reset(self, task: Task, seed: int) -> str | None:
        self.said, self.seed = [], seed
        return task.columns.get("opening")

    def step(self, text: str) -> Step:
        match text:
            case "sleep":
                time.sleep(60)
            case "daemon":  # in no session of this process, and its parent has gone; the observation is its number
                return Step(daemon())
            case "raise":
                raise RuntimeError("the environment does not want to")
            case "exit":
                os._exit(3)
            case "memory":
                raise MemoryError
            case "nan":
                return Step(reward=float("nan"))
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


class Unmakeable:
    def __init__(self) -> None:
        raise OSError("no display")


class UnmakeableEnvironment(Unmakeable, Counting):
    """The same with every method that an environment has."""
