"""Chat templates as text, and the date that they print: the same for the whole run, whatever day a row is
rendered on.

A template reads the clock through ``strftime_now``. Without a fixed date, every prompt would be a different
text on the next day.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rltrain.model_files import local_file

_CLOCK = "strftime_now"  # transformers' name for the clock in templates
_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")  # where a template may be


def is_template_file(chat_template: str) -> bool:
    """Whether ``data.chat_template`` names a file."""
    return chat_template not in ("auto", "none")


def read_template(file: str) -> str:
    """The text of a chat template. Raises ValueError if the file cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.chat_template {file!r} cannot be read ({getattr(error, 'strerror', None) or error}); give "
            "the path of a UTF-8 text file, from the recipe's folder, or auto"
        ) from error


def clock_is_read(template: str) -> bool:
    return _CLOCK in template


def prints_date(path: str, revision: str | None = None) -> bool:
    """Whether the chat template of the model at ``path`` reads the clock; False where there is no such
    model.
    """
    try:
        files = [local_file(path, revision, name) for name in _FILES]
        return any(clock_is_read(file.read_text(encoding="utf-8")) for file in files if file is not None)
    except (OSError, ValueError):  # loading the model will report the problem
        return False


def frozen_clock(date: dt.date | None) -> dict[str, Any]:
    """Keywords for ``apply_chat_template`` that set its clock to midnight of ``date``; None: the current
    time.
    """
    if date is None:
        return {}
    clock: Callable[[str], str] = dt.datetime.combine(date, dt.time.min).strftime
    return {_CLOCK: clock}
