"""Where in a completion the program stands. Strings in, strings out.

Every expression takes time linear in the text: what repeats gives nothing back (``*+``) where the rest could
take it as well.
"""

from __future__ import annotations

import re
from typing import Literal

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>")
_FENCE = re.compile(r"^[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([\w+.-]*+)[^\n`]*+$", re.MULTILINE)
_PYTHON = frozenset({"", "python", "python3", "py", "py3"})
_GOES_ON = re.compile(r"[ \t]|$|[)\]}#@]|(?:async[ \t]+)?def\b|class\b|import\b|from\b")


def program(
    completion: str, before: str | None, entry: str | None, extract: Literal["auto", "fenced", "continuation"]
) -> str | None:
    """The Python of a completion behind the Python ``before`` it (None: there is none); None where the
    completion holds no program.

    fenced: the last fenced block that defines ``entry``, else the last one; a completion without fences is
    all program. continuation: the completion goes on where ``before`` ends, up to the first line at the
    margin that is no definition. auto: fenced where there is a fence or ``entry`` is defined at the margin,
    else continuation. Text before a closing think tag and special tokens are left out. A fence that is never
    closed ends with the text.
    """
    text = _SPECIAL_TOKEN.sub("", completion.rpartition("</think>")[2])
    if not text.strip():
        return None
    blocks = fenced_blocks(text)
    if extract == "auto":
        extract = "fenced" if blocks or before is None or defines(text, entry) else "continuation"
    if extract == "continuation":
        return (before or "") + continued(text)
    if not blocks and _FENCE.search(text):
        return None  # fences of other languages only
    chosen = next(
        (block for block in reversed(blocks) if defines(block, entry)), blocks[-1] if blocks else text
    )
    return chosen if before is None else f"{before}\n\n{chosen}"


def fenced_blocks(text: str) -> list[str]:
    """What stands in fences marked as Python or not at all, in order."""
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[2] and fence[1].startswith(opened[1]):
            blocks += [text[opened.end() + 1 : fence.start()]] if opened[2].lower() in _PYTHON else []
            opened = None
    if opened is not None and opened[2].lower() in _PYTHON:
        blocks.append(text[opened.end() + 1 :])
    return blocks


def continued(text: str) -> str:
    """The lines that continue a function: indented or empty ones, then definitions, until anything
    else stands at the margin.
    """
    lines = text.split("\n")
    kept = next(
        (number for number, line in enumerate(lines) if number > 0 and not _GOES_ON.match(line)), len(lines)
    )
    return "\n".join(lines[:kept])


def defines(text: str, name: str | None) -> bool:
    """Whether a function, class or variable of this name is made at the margin."""
    if name is None:
        return False
    word = re.escape(name)
    return (
        re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{word}\b|^{word}[ \t]*[:=]", text, re.MULTILINE)
        is not None
    )
