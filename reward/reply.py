"""A worker's replies, as JSON after an eight-byte length: numbers and text, which may be wrong but cannot
execute code.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from typing import Literal

from rltrain.reward.score import Score

LENGTH = struct.Struct(">Q")
LARGEST = 1 << 26  # bytes of one answer

# How ``received.py`` validates a class whose ``__pydantic_config__`` names it.
STRICT = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True)
class GraderFacts:
    """The facts about a grader that the pool needs."""

    scope: Literal["completion", "group"]
    reads_ids: bool = False  # whether the token ids of completions are sent to it

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Reply:
    """``scores``, or a ``reason`` ("error", "memory", "contract") and ``message`` if there are none.

    ``task`` repeats the number of the task. The first reply carries the graders' facts instead of scores.
    """

    task: int = 0
    scores: list[Score] | None = None
    reason: str = ""
    message: str = ""
    graders: tuple[GraderFacts, ...] = ()

    __pydantic_config__ = STRICT


def add_length(body: bytes) -> bytes:
    """``body`` after its length in eight bytes."""
    return LENGTH.pack(len(body)) + body


def encode_reply(answer: Reply) -> bytes:
    """The reply as a message. A reply that is too large to be accepted becomes an error that says so."""
    body = to_json(answer)
    if len(body) > LARGEST:
        body = to_json(
            Reply(
                answer.task,
                reason="error",
                message=f"scores of {len(body)} bytes; at most {LARGEST} are accepted",
            )
        )
    return add_length(body)


def to_json(answer: object) -> bytes:
    """A dataclass as JSON in UTF-8, with a question mark for a lone surrogate. Raises ValueError on NaN and
    infinity.
    """
    assert dataclasses.is_dataclass(answer) and not isinstance(answer, type)
    text = json.dumps(dataclasses.asdict(answer), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", errors="replace")
