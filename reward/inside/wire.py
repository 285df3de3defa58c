"""Plain values and messages between a program under test, its tests and the grader.

Objects never cross, only the data in them: what arrives is made of Python's own types, so that no program can
hand its tests an object that compares equal to everything. JSON with one-key objects for what JSON lacks.
"""

from __future__ import annotations

import itertools
import json
import operator
import socket
import struct
from collections.abc import Callable
from typing import Any

LENGTH = struct.Struct(">I")
DEPTH = 100  # of nested containers
ITEMS = 100_000  # that an iterator may give

_JSON_INTEGER = 2**53
_SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray)
_CONTAINERS = {list: "", tuple: "t", set: "s", frozenset: "f"}
_MADE: dict[str, Callable[[Any], Any]] = {
    "i": lambda text: int(text, 16),
    "t": lambda items: tuple(unpacked(item) for item in items),
    "s": lambda items: {unpacked(item) for item in items},
    "f": lambda items: frozenset(unpacked(item) for item in items),
    "d": lambda pairs: {unpacked(key): unpacked(value) for key, value in pairs},
    "b": bytes.fromhex,
    "a": bytearray.fromhex,
    "c": lambda parts: complex(float(parts[0]), float(parts[1])),
    "n": lambda items: iter([unpacked(item) for item in items]),
}


class NotPlain(Exception):
    """A value that is not data, is too deep, or a message that is not one."""


class Hangup(Exception):
    """The other side is gone."""


def packed(value: Any, depth: int = DEPTH) -> Any:
    """``value`` as JSON data.

    Subclasses become what they extend (a Counter a dict), an iterator what it gives. Raises NotPlain.
    """
    if depth == 0:
        raise NotPlain(f"nested deeper than {DEPTH}")
    if isinstance(value, _SCALARS):
        return _packed_scalar(value)
    if isinstance(value, dict):
        return {"d": [[packed(key, depth - 1), packed(item, depth - 1)] for key, item in value.items()]}
    for kind, tag in _CONTAINERS.items():
        if isinstance(value, kind):
            items = [packed(item, depth - 1) for item in value]
            return {tag: items} if tag else items
    if hasattr(type(value), "__index__"):
        return packed(operator.index(value), depth - 1)
    if hasattr(type(value), "__next__"):
        items = list(itertools.islice(value, ITEMS + 1))
        if len(items) > ITEMS:
            raise NotPlain(f"an iterator of more than {ITEMS} items")
        return {"n": [packed(item, depth - 1) for item in items]}
    raise NotPlain(f"a value of type {type(value).__name__}")


def _packed_scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        plain = int(value)
        return plain if abs(plain) < _JSON_INTEGER else {"i": hex(plain)}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"b": value.hex()}
    if isinstance(value, bytearray):
        return {"a": value.hex()}
    return str(value) if isinstance(value, str) else float(value)


def unpacked(data: Any) -> Any:
    """The value again, of built-in types exactly.

    Raises NotPlain on anything that ``packed`` does not make.
    """
    if isinstance(data, list):
        return [unpacked(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise NotPlain("an object must have one key")
    ((tag, content),) = data.items()
    if tag not in _MADE:
        raise NotPlain(f"unknown tag {tag!r:.20}")
    try:
        return _MADE[tag](content)
    except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise NotPlain(f"{tag}: {error}") from error


def send(channel: socket.socket, message: Any, limit: int) -> None:
    """Raises NotPlain where the message has more than ``limit`` bytes, Hangup where nobody is there
    to read it.
    """
    body = json.dumps(message).encode("ascii")
    if len(body) > limit:
        raise NotPlain(f"{len(body)} bytes of data, more than {limit}")
    try:
        channel.sendall(LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise Hangup(str(error)) from error


def receive(channel: socket.socket, limit: int) -> Any:
    """The next message, as JSON has it.

    Raises Hangup, TimeoutError, and NotPlain on what is none or is too large.
    """
    size = LENGTH.unpack(_exactly(channel, LENGTH.size))[0]
    if size > limit:
        raise NotPlain(f"{size} bytes of data, more than {limit}")
    try:
        return json.loads(_exactly(channel, size))
    except (ValueError, RecursionError) as error:
        raise NotPlain(f"not a message: {error}") from error


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        try:
            part = channel.recv(min(size, 1 << 16))
        except TimeoutError:
            raise
        except OSError as error:
            raise Hangup(str(error)) from error
        if not part:
            raise Hangup("closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
