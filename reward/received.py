"""What arrives from a process that somebody else's code runs in: validated before anything reads it."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

_Answer = TypeVar("_Answer")


class MalformedAnswerError(Exception):
    """What a worker sent is no answer: somebody else wrote to its socket."""


def received(kind: type[_Answer], body: bytes) -> _Answer:
    """``body`` as an instance of the dataclass ``kind``, strictly. Raises MalformedAnswerError."""
    try:
        return _adapter(kind).validate_json(body, strict=True)
    except (ValidationError, RecursionError) as error:
        raise MalformedAnswerError(f"it begins with {body[:60]!r}") from error


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
