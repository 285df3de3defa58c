"""Plain values and messages between a program under test, its tests and the grader.

Objects never cross, only the data in them: every received value is made of built-in types, so that no program
can hand its tests an object that compares equal to everything. The format is JSON, with one-key objects for
the types that JSON lacks.
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
MAX_DEPTH = 100  # nested containers
MAX_ITEMS = 100_000  # items of an iterator

_JSON_INTEGER = 2**53
_SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray)
_CONTAINERS = {list: "", tuple: "t", set: "s", frozenset: "f"}
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "i": lambda text: int(text, 16),
    "t": lambda items: tuple(unpack(item) for item in items),
    "s": lambda items: {unpack(item) for item in items},
    "f": lambda items: frozenset(unpack(item) for item in items),
    "d": lambda pairs: {unpack(key): unpack(value) for key, value in pairs},
    "b": bytes.fromhex,
    "a": bytearray.fromhex,
    "c": lambda parts: complex(float(parts[0]), float(parts[1])),
    "n": lambda items: iter([unpack(item) for item in items]),
}


class NotPlain(Exception):
    """A value is not plain data or is nested too deeply, or a message is malformed."""


class Hangup(Exception):
    """The other side is gone."""


def pack(value: Any, depth: int = MAX_DEPTH) -> Any:
    """``value`` as JSON data.

    A subclass becomes its built-in base type (a Counter a dict), an iterator its items. Raises NotPlain.
    """
    if depth == 0:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, _SCALARS):
        return _pack_scalar(value)
    if isinstance(value, dict):
        return {"d": [[pack(key, depth - 1), pack(item, depth - 1)] for key, item in value.items()]}
    for kind, tag in _CONTAINERS.items():
        if isinstance(value, kind):
            items = [pack(item, depth - 1) for item in value]
            return {tag: items} if tag else items
    if hasattr(type(value), "__index__"):
        return pack(operator.index(value), depth - 1)
    if hasattr(type(value), "__next__"):
        items = list(itertools.islice(value, MAX_ITEMS + 1))
        if len(items) > MAX_ITEMS:
            raise NotPlain(f"an iterator of more than {MAX_ITEMS} items")
        return {"n": [pack(item, depth - 1) for item in items]}
    raise NotPlain(f"a value of type {type(value).__name__}")


def _pack_scalar(value: Any) -> Any:
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


def unpack(data: Any) -> Any:
    """The value from its JSON data, made of built-in types only. Raises NotPlain on data that ``pack`` never
    produces.
    """
    if isinstance(data, list):
        return [unpack(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise NotPlain("an object must have one key")
    ((tag, content),) = data.items()
    if tag not in _DECODERS:
        raise NotPlain(f"unknown tag {tag!r:.20}")
    try:
        return _DECODERS[tag](content)
    except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise NotPlain(f"{tag}: {error}") from error


def send_message(channel: socket.socket, message: Any, limit: int) -> None:
    """Sends a message. Raises NotPlain if it has more than ``limit`` bytes, Hangup if the other side is
    gone."""
    body = json.dumps(message).encode("ascii")
    if len(body) > limit:
        raise NotPlain(f"{len(body)} bytes of data, more than {limit}")
    try:
        channel.sendall(LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise Hangup(str(error)) from error


def receive_message(channel: socket.socket, limit: int) -> Any:
    """The next message, as JSON data.

    Raises Hangup, TimeoutError, and NotPlain on a malformed or too large message.
    """
    size = LENGTH.unpack(_receive_exactly(channel, LENGTH.size))[0]
    if size > limit:
        raise NotPlain(f"{size} bytes of data, more than {limit}")
    try:
        return json.loads(_receive_exactly(channel, size))
    except (ValueError, RecursionError) as error:
        raise NotPlain(f"not a message: {error}") from error


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        try:
            chunk = channel.recv(min(size, 1 << 16))
        except TimeoutError:
            raise
        except OSError as error:
            raise Hangup(str(error)) from error
        if not chunk:
            raise Hangup("closed")
        parts.append(chunk)
        size -= len(chunk)
    return b"".join(parts)
