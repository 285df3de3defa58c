"""Finds the program in a completion. Strings in, strings out.

Every expression takes time linear in the text: repetitions are possessive (``*+``) where the rest of the
expression could match the same text.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Literal

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>")
_FENCE = re.compile(r"^[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([\w+.-]*+)[^\n`]*+$", re.MULTILINE)
_PYTHON = frozenset({"", "python", "python3", "py", "py3"})
_CONTINUES = re.compile(r"[ \t]|$|[)\]}#@]|(?:async[ \t]+)?def\b|class\b|import\b|from\b")


def extract_program(
    completion: str, before: str | None, entry: str | None, extract: Literal["auto", "fenced", "continuation"]
) -> str | None:
    """The program: the Python ``before`` the completion (None: there is none) and the completion's own
    Python; None if the completion contains no program.

    fenced: take the last fenced block that defines ``entry``, else the last block; a completion without
    fences is a program as it is. continuation: the completion continues ``before``, up to the first
    unindented line that is not a definition. auto: fenced if there is a fence or the completion defines
    ``entry`` without indentation, else continuation. Text before a closing think tag and special tokens are
    dropped. An unclosed fence ends with the text.
    """
    text = _SPECIAL_TOKEN.sub("", completion.rpartition("</think>")[2])
    if not text.strip():
        return None
    blocks = fenced_blocks(text)
    if extract == "auto":
        extract = "fenced" if blocks or before is None or defines(text, entry) else "continuation"
    if extract == "continuation":
        return (before or "") + continuation_lines(text)
    if not blocks and _FENCE.search(text):
        return None  # all fences are of other languages
    block_or_text = next(
        (block for block in reversed(blocks) if defines(block, entry)), blocks[-1] if blocks else text
    )
    return block_or_text if before is None else f"{before}\n\n{block_or_text}"


def last_block(text: str, languages: Set[str]) -> str | None:
    """The content of the last fence that is marked as one of ``languages`` ("": unmarked); None without."""
    blocks = fenced_blocks(text, languages)
    return blocks[-1] if blocks else None


def fenced_blocks(text: str, languages: Set[str] = _PYTHON) -> list[str]:
    """The contents of fences that are marked as one of ``languages``, by default Python or unmarked, in
    order.
    """
    blocks: list[str] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif not fence[2] and fence[1].startswith(opening[1]):
            is_meant = opening[2].lower() in languages
            blocks += [text[opening.end() + 1 : fence.start()]] if is_meant else []
            opening = None
    if opening is not None and opening[2].lower() in languages:
        blocks.append(text[opening.end() + 1 :])
    return blocks


def continuation_lines(text: str) -> str:
    """The lines that continue a function: indented or empty lines and definitions, up to any other unindented
    line.
    """
    lines = text.split("\n")
    end = next(
        (number for number, line in enumerate(lines) if number > 0 and not _CONTINUES.match(line)), len(lines)
    )
    return "\n".join(lines[:end])


def defines(text: str, name: str | None) -> bool:
    """Whether an unindented line defines a function, class or variable of this name."""
    if name is None:
        return False
    word = re.escape(name)
    return (
        re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{word}\b|^{word}[ \t]*[:=]", text, re.MULTILINE)
        is not None
    )
