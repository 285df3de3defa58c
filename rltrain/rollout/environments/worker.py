"""An environment process: started by ``pool.py`` with one end of a socket, plays episodes until the other end
closes.

It imports no torch. It answers one request at a time, so that a late answer names its episode.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.reward.caught import Caught
from rltrain.reward.channel import Channel, bound_cpu_time, bound_memory
from rltrain.reward.reply import STRICT, add_length, to_json
from rltrain.reward.score import is_float32
from rltrain.reward.source import import_file
from rltrain.rollout.environments import Environment, Step, Task

__all__ = [
    "Answer",
    "EndAll",
    "EnvironmentSetup",
    "Request",
    "Reset",
    "TakeTurn",
    "environment_factory",
    "main",
]

_LONGEST_TEXT = 10_000_000  # characters of one observation, far beyond what any policy reads


@dataclass(frozen=True)
class EnvironmentSetup:
    """The first message: which class, with which options.

    ``module`` is a module's name or the path of a user's file.
    """

    module: str
    attribute: str
    options: Mapping[str, Any]
    seconds: float
    memory_bytes: int  # of address space


@dataclass(frozen=True)
class Reset:
    """Begin episode ``episode``."""

    episode: int
    task: Task
    seed: int


@dataclass(frozen=True)
class TakeTurn:
    """One turn of the policy in an episode that this process has begun."""

    episode: int
    text: str


@dataclass(frozen=True)
class EndAll:
    """Close every episode and forget it."""


@dataclass(frozen=True)
class Request:
    """A call of an environment, under a number that it is not told."""

    number: int
    body: Reset | TakeTurn | EndAll


@dataclass(frozen=True)
class Answer:
    """``opening`` of a reset, ``step`` of a turn; or ``failure`` ("error", "memory") and ``message``. The
    first answer, which says that the process is ready, is empty.

    ``number`` is the request's.
    """

    opening: str | None = None
    step: Step | None = None
    failure: str = ""
    message: str = ""
    number: int = 0

    __pydantic_config__ = STRICT


def main(descriptor: int) -> None:
    channel = Channel(descriptor)
    setup: EnvironmentSetup = channel.receive()
    make: Callable[[], Environment] | None = None
    with Caught() as caught:
        bound_memory(setup.memory_bytes)
        make = environment_factory(setup)
        make()  # its options are tried before anything depends on them
    if make is None or caught.error is not None:
        channel.send(add_length(to_json(Answer(failure="error", message=str(caught)[:2000]))))
        return

    channel.send(add_length(to_json(Answer())))
    playing: dict[int, Environment] = {}
    while True:
        request: Request = channel.receive()
        bound_cpu_time(setup.seconds)
        answer = dataclasses.replace(answer_request(request.body, playing, make), number=request.number)
        channel.exit_if_forked()
        channel.send(add_length(to_json(answer)))


def answer_request(
    request: Reset | TakeTurn | EndAll, playing: dict[int, Environment], make: Callable[[], Environment]
) -> Answer:
    """The environment's answer, or why there is none."""
    answer = Answer()
    with Caught() as caught:
        match request:
            case Reset():
                playing[request.episode] = make()
                answer = Answer(
                    opening=_check_opening(playing[request.episode].reset(request.task, request.seed))
                )
            case TakeTurn():
                answer = Answer(step=_to_plain_step(playing[request.episode].step(request.text)))
            case EndAll():
                while playing:
                    playing.popitem()[1].close()
    if caught.error is None:
        return answer
    failure = "memory" if isinstance(caught.error, MemoryError) else "error"
    return Answer(failure=failure, message=str(caught)[:2000])


def environment_factory(setup: EnvironmentSetup) -> Callable[[], Environment]:
    """Makes one environment per episode. Raises ValueError where a user's file has no such class."""
    if not setup.module.endswith(".py"):
        module = importlib.import_module(setup.module)
        return functools.partial(getattr(module, setup.attribute), **setup.options)

    file = Path(setup.module).resolve()
    module = import_file(file, f"user_environment_{file.stem}")
    if not hasattr(module, setup.attribute):
        raise ValueError(f"{file} has no class {setup.attribute!r}")
    return functools.partial(getattr(module, setup.attribute), **setup.options)


def _check_opening(opening: Any) -> str | None:
    if opening is not None and not isinstance(opening, str):
        raise ValueError(f"reset must return text or None, got {type(opening).__name__}: {opening!r:.200}")
    return None if opening is None else _check_length(opening)


def _to_plain_step(result: Any) -> Step:
    """A step of plain values.

    Raises ValueError on anything else, a number that float32 cannot hold included.
    """
    if not isinstance(result, Step) or not isinstance(result.observation, str):
        raise ValueError(
            "step must return a rltrain.rollout.environments.Step with a text as observation, got "
            f"{result!r:.200}"
        )
    numbers = [_to_float(value) for value in (result.reward, *result.parts.values())]
    if not all(map(is_float32, numbers)):
        raise ValueError(
            f"rewards and parts must be finite, got reward {result.reward!r:.50} and parts "
            f"{dict(result.parts)!r:.200}"
        )
    parts = dict(zip(map(str, result.parts), numbers[1:], strict=True))
    return Step(_check_length(result.observation), bool(result.done), numbers[0], parts)


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_length(text: str) -> str:
    """Raises ValueError on a text that no policy could read."""
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(text)} characters; at most {_LONGEST_TEXT} are accepted")
    return str(text)
