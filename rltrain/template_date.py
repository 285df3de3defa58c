"""The date that a chat template prints: one for the whole run, whatever day it is when a row is rendered.

A template reads the clock through ``strftime_now``. Rendered anew on the next day, every prompt would be
another text.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

from rltrain.model_files import local_file

_CLOCK = "strftime_now"  # as transformers calls what it gives to templates
_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")  # where a template may stand


def prints_date(path: str, revision: str | None = None) -> bool:
    """Whether the chat template of the model at ``path`` reads the clock.

    False where there is no such model.
    """
    try:
        files = [local_file(path, revision, name) for name in _FILES]
        return any(_CLOCK in file.read_text(encoding="utf-8") for file in files if file is not None)
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return False


def frozen_clock(date: dt.date | None) -> dict[str, Any]:
    """Keywords for ``apply_chat_template`` under which it is midnight of ``date``; None: whatever the
    time is.
    """
    if date is None:
        return {}
    clock: Callable[[str], str] = dt.datetime.combine(date, dt.time.min).strftime
    return {_CLOCK: clock}
