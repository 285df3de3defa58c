"""The date that a chat template prints: the same for the whole run, whatever day a row is rendered on.

A template reads the clock through ``strftime_now``. Without a fixed date, every prompt would be a different
text on the next day.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

from rltrain.model_files import local_file

_CLOCK = "strftime_now"  # transformers' name for the clock in templates
_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")  # where a template may be


def prints_date(path: str, revision: str | None = None) -> bool:
    """Whether the chat template of the model at ``path`` reads the clock; False where there is no such
    model.
    """
    try:
        files = [local_file(path, revision, name) for name in _FILES]
        return any(_CLOCK in file.read_text(encoding="utf-8") for file in files if file is not None)
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
