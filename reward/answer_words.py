r"""Answers that are no mathematics: words, letters of a choice, times of day. Strings in, strings out.

Words are compared only where the reference *is* words, and with an answer that is words too: nothing that
means something in a formula (signs, operators, brackets, digits) is ever left out.
"""

from __future__ import annotations

import re

from reward.answer_notation import TEXT_GROUP

_LETTERS = re.compile(r"[^\W\d_]+(?:[\s.,!?'-]+[^\W\d_]+)*[.!?]*")
_HYPHEN_OR_PRIME = re.compile(r"[-'](?![^\W\d_]{2})")
_VARIABLE = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_SHORT_WORDS = frozenset(
    ("yes", "no", "odd", "even", "one", "two", "six", "ten", "red", "all", "any", "both", "none")
)
_CHOICES = re.compile(r"\(?[A-Z]\)?\.?(?:(?:\s?[,;]\s?(?:and\s)?|\s(?:and\s)?)\(?[A-Z]\)?\.?){0,25}")
_LABELLED = re.compile(
    r"(?:(?:option|choice)\s(?=\(?[A-Z]\)?\.?$))?\(?([A-Z])(?:[).:]+(?:(?:\\?\s).*)?)?", re.IGNORECASE
)
_CAPITAL = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
_CLOCK = re.compile(
    r"(?<![\d:])(\d{1,2}):(\d{2})(?::(\d{2}))?(?![\d:])\s*(?:([ap])\.?\s*m\b\.?)?", re.IGNORECASE
)


def words(text: str) -> str:
    """For comparing answers in words: no LaTeX, case, punctuation, article or doubled space."""
    text = TEXT_GROUP.sub(r" \1 ", text)
    text = re.sub(r"[^\w\s]|_", " ", text).casefold()
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def is_words(text: str) -> bool:
    r"""True where a text can only be words and not a formula: letters alone, of which a \text group or four
    in a row.

    A single letter outside a group is a variable ("x\text{ inches}"). Short words without a group are known
    by name.
    """
    text = text.strip("$ ")
    bare = TEXT_GROUP.sub(r" \1 ", text).strip()
    outside = TEXT_GROUP.sub(" ", text)
    if _LETTERS.fullmatch(bare) is None or _VARIABLE.search(outside) or _HYPHEN_OR_PRIME.search(bare):
        return False
    a_word = r"[A-Za-z]{4}" if outside == text else r"[A-Za-z]{2}"
    return re.search(a_word, bare) is not None or bare.casefold().rstrip(".!?") in _SHORT_WORDS


def same_words(gold: str, answer: str) -> bool:
    """Equal words, where nothing but letters, articles and punctuation stands in either."""
    bare = TEXT_GROUP.sub(r" \1 ", answer).strip("$ \"'.,!?")
    return _LETTERS.fullmatch(bare) is not None and words(gold) == words(answer) != ""


def choices(text: str) -> frozenset[str] | None:
    """The capital letters that a text consists of ("B", "(B)", "A, B and E"), or None."""
    bare = _one_line(text)
    return frozenset(_CAPITAL.findall(bare)) if _CHOICES.fullmatch(bare) else None


def chosen(text: str) -> frozenset[str] | None:
    """What ``choices`` gives, or the letter before what it stands for: "option B", "(B) 16"."""
    letters = choices(text)
    labelled = _LABELLED.fullmatch(_one_line(text)) if letters is None else None
    return letters if labelled is None or not labelled[1].isupper() else frozenset(labelled[1])


def _one_line(text: str) -> str:
    return " ".join(TEXT_GROUP.sub(r"\1", text).strip("$ ").split())


def clock_seconds(text: str) -> tuple[int, bool] | None:
    """Seconds since midnight of the one time in ``text``, and whether it can only be a time of day (and not a
    ratio)."""
    times = list(_CLOCK.finditer(TEXT_GROUP.sub(r" \1 ", text)))
    if len(times) != 1:
        return None
    hours, minutes, seconds = int(times[0][1]), int(times[0][2]), int(times[0][3] or 0)
    half = (times[0][4] or "").lower()
    if hours > (12 if half else 24) or minutes > 59 or seconds > 59:
        return None
    hours = hours % 12 + (12 if half == "p" else 0) if half else hours
    return hours * 3600 + minutes * 60 + seconds, bool(half) or times[0][3] is not None
