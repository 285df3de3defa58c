"""Validates messages from a process that runs third-party code, before anything else reads them."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

_Answer = TypeVar("_Answer")


class MalformedAnswerError(Exception):
    """A worker's message is not an answer: a grader wrote to its socket."""


def validate_answer(kind: type[_Answer], body: bytes) -> _Answer:
    """``body`` as an instance of the dataclass ``kind``, strictly validated. Raises MalformedAnswerError."""
    try:
        return _adapter(kind).validate_json(body, strict=True)
    except (ValidationError, RecursionError) as error:
        raise MalformedAnswerError(f"it begins with {body[:60]!r}") from error


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
