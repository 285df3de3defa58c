"""What a worker answers, as JSON behind an eight-byte length: numbers and text, which may be wrong
but cannot execute.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from typing import Literal

from reward.score import Score

LENGTH = struct.Struct(">Q")
LARGEST = 1 << 26  # bytes of one answer

STRICT = {"extra": "forbid", "allow_inf_nan": False}  # how ``received.py`` validates a class that names it


@dataclass(frozen=True)
class GraderFacts:
    """What the pool needs to know of a grader."""

    scope: Literal["completion", "group"]
    reads_ids: bool = False  # whether the token ids of completions are sent to it

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Reply:
    """``scores`` or, where there are none, ``reason`` ("error", "memory", "contract") and ``message``.

    ``task`` repeats the number that the task came with. The first reply has the graders' facts in place of
    scores.
    """

    task: int = 0
    scores: list[Score] | None = None
    reason: str = ""
    message: str = ""
    graders: tuple[GraderFacts, ...] = ()

    __pydantic_config__ = STRICT


def framed(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def encoded(answer: Reply) -> bytes:
    """A frame; an answer too large to be accepted becomes an error that says so."""
    body = json_of(answer)
    if len(body) > LARGEST:
        body = json_of(
            Reply(
                answer.task,
                reason="error",
                message=f"scores of {len(body)} bytes; at most {LARGEST} are accepted",
            )
        )
    return framed(body)


def json_of(answer: object) -> bytes:
    """A dataclass as UTF-8, in which a lone surrogate is a question mark.

    Raises ValueError on NaN and infinity.
    """
    assert dataclasses.is_dataclass(answer) and not isinstance(answer, type)
    text = json.dumps(dataclasses.asdict(answer), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", errors="replace")
