"""Reads JSON that others wrote: what comes out can be searched, copied and written as UTF-8 again.

Python's reader raises exceptions of three kinds. It accepts halves of surrogate pairs, which no tokenizer and
no file takes, and nesting that the next recursive function cannot follow.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["parse_json"]

_DEPTH = 64  # levels of nesting; tool definitions, the deepest that data sets hold, have about ten
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\\ud800-\\udfff]")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError for anything that cannot be used; json.JSONDecodeError, which has line and column, where
    the text is no JSON.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError(f"nested more than {_DEPTH} levels deep") from error
    except ValueError as error:  # Python reads no integer of thousands of digits
        raise ValueError("holds an integer of more than 4300 digits; write a float, or text") from error
    if text.count("[") + text.count("{") > _DEPTH:
        _refuse_depth(value)
    if _ESCAPED_SURROGATE.search(text) and (half := _SURROGATE.search(json.dumps(value, ensure_ascii=False))):
        raise ValueError(
            f"holds half of a surrogate pair ({half[0]!a}), which is no character; remove it, or write the "
            "whole character"
        )
    return value


def _refuse_depth(value: Any) -> None:
    """Raises ValueError where lists and mappings are nested too deeply."""
    level = [value]
    for _ in range(_DEPTH + 1):
        if not level:
            return
        level = [
            item
            for holder in level
            if isinstance(holder, list | dict)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
    raise ValueError(f"nested more than {_DEPTH} levels deep")
