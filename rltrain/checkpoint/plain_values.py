"""Values of a data set's columns as JSON text, from which equal values of equal types are read again."""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

__all__ = ["decode_value", "encode_value"]

_TYPE = "$type"  # marks an object that stands for a value which JSON does not have
_WRITERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("bytes", lambda value: base64.b64encode(value).decode("ascii")),
    dt.datetime: ("datetime", lambda value: [value.isoformat(), value.fold]),
    dt.date: ("date", dt.date.isoformat),
    dt.time: ("time", lambda value: [value.isoformat(), value.fold]),
    dt.timedelta: ("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    Decimal: ("decimal", str),
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tuple": lambda items: tuple(map(_restore, items)),
    "dict": lambda pairs: {_restore(key): _restore(value) for key, value in pairs},
    "bytes": base64.b64decode,
    "datetime": lambda parts: dt.datetime.fromisoformat(parts[0]).replace(fold=parts[1]),
    "date": dt.date.fromisoformat,
    "time": lambda parts: dt.time.fromisoformat(parts[0]).replace(fold=parts[1]),
    "timedelta": lambda parts: dt.timedelta(*parts),
    "decimal": Decimal,
}


def encode_value(value: Any) -> str:
    """Strict JSON in ASCII. Raises TypeError for a value of a type that columns do not have."""
    return json.dumps(_plain(value), allow_nan=False)


def decode_value(text: str) -> Any:
    """What ``encode_value`` was given; mappings are dicts. Raises ValueError for another text."""
    try:
        return _restore(json.loads(text))
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{text!r:.80} is no value of a column ({error})") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_TYPE: "float", "value": str(value)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return {_TYPE: "tuple", "value": [_plain(item) for item in value]}
    if isinstance(value, Mapping):
        if _TYPE not in value and all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return {_TYPE: "dict", "value": [[_plain(key), _plain(item)] for key, item in value.items()]}
    for kind, (name, write) in _WRITERS.items():  # a datetime is a date as well, and comes first
        if isinstance(value, kind):
            return {_TYPE: name, "value": write(value)}
    raise TypeError(f"a {type(value).__name__} ({value!r:.60})")


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    if isinstance(value, dict):
        if _TYPE in value:
            return _READERS[value[_TYPE]](value["value"])
        return {key: _restore(item) for key, item in value.items()}
    return value
