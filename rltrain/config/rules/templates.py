"""Rules about the chat template of a recipe's data."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.chat_template import is_template_file, read_template
from rltrain.config.schema import Source


def template_problems(data: Source) -> Iterator[str]:
    """A template file that cannot be read, and settings that only a template reads."""
    if is_template_file(data.chat_template):
        try:
            read_template(data.chat_template)
        except ValueError as error:
            yield str(error)
    if data.chat_template == "none" and data.chat_template_kwargs:
        yield (
            f"data.chat_template_kwargs is {data.chat_template_kwargs}, but data.chat_template is none, so "
            "nothing reads it; remove one of them"
        )
