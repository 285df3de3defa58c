"""Completions as rows of a table, for trackers that show tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["COLUMNS", "completion_rows", "markdown_table"]

COLUMNS = ("step", "prompt", "completion", "score", "ungraded", "finish", "tokens")
_CELL = 400  # characters of a cell in markdown


def completion_rows(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A row for every completion of transcript records (``report/transcripts.py``), in COLUMNS' order.

    An ungraded completion has no score and the reason.
    """
    return [
        [
            record["step"],
            record["prompt"],
            completion["text"],
            completion["score"],
            completion["ungraded"] or "",
            completion["finish"],
            completion["tokens"],
        ]
        for record in records
        for completion in record["completions"]
    ]


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """The rows as a markdown table; a text is shown as it was written, cut to its first characters."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    text = text if len(text) <= _CELL else f"{text[:_CELL]}..."
    for special, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\r", ""), ("\n", "<br>")):
        text = text.replace(special, written)
    return text
