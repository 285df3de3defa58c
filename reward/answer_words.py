r"""Answers that are not mathematics: words, letters of a choice, times of day. Strings in, strings out.

Words are compared only if both the reference and the answer are words: the comparison never drops a character
that has a meaning in a formula (signs, operators, brackets, digits).
"""

from __future__ import annotations

import re

from rltrain.reward.answer_notation import TEXT_GROUP

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


def normalize_words(text: str) -> str:
    """``text`` without LaTeX, case, punctuation, articles and repeated spaces, for comparing words."""
    text = TEXT_GROUP.sub(r" \1 ", text)
    text = re.sub(r"[^\w\s]|_", " ", text).casefold()
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def is_words(text: str) -> bool:
    r"""Whether a text can only be words and not a formula: it consists of letters, with a \text group or four
    letters in a row.

    A single letter outside a group is a variable ("x\text{ inches}"). Short words without a group come from a
    list.
    """
    text = text.strip("$ ")
    plain_text = TEXT_GROUP.sub(r" \1 ", text).strip()
    outside = TEXT_GROUP.sub(" ", text)
    if (
        _LETTERS.fullmatch(plain_text) is None
        or _VARIABLE.search(outside)
        or _HYPHEN_OR_PRIME.search(plain_text)
    ):
        return False
    word_pattern = r"[A-Za-z]{4}" if outside == text else r"[A-Za-z]{2}"
    return (
        re.search(word_pattern, plain_text) is not None or plain_text.casefold().rstrip(".!?") in _SHORT_WORDS
    )


def same_words(gold: str, answer: str) -> bool:
    """Whether the words are equal and the answer contains only letters and punctuation."""
    plain_text = TEXT_GROUP.sub(r" \1 ", answer).strip("$ \"'.,!?")
    return (
        _LETTERS.fullmatch(plain_text) is not None and normalize_words(gold) == normalize_words(answer) != ""
    )


def choice_letters(text: str) -> frozenset[str] | None:
    """The capital letters of a text that is only these ("B", "(B)", "A, B and E"), or None."""
    plain_text = _single_line(text)
    return frozenset(_CAPITAL.findall(plain_text)) if _CHOICES.fullmatch(plain_text) else None


def chosen_letters(text: str) -> frozenset[str] | None:
    """Like ``choice_letters``, or the letter of a labelled choice: "option B", "(B) 16"."""
    letters = choice_letters(text)
    labelled = _LABELLED.fullmatch(_single_line(text)) if letters is None else None
    return letters if labelled is None or not labelled[1].isupper() else frozenset(labelled[1])


def _single_line(text: str) -> str:
    return " ".join(TEXT_GROUP.sub(r"\1", text).strip("$ ").split())


def clock_seconds(text: str) -> tuple[int, bool] | None:
    """Seconds since midnight of the only time in ``text``, and whether it can only be a time of day (not a
    ratio)."""
    times = list(_CLOCK.finditer(TEXT_GROUP.sub(r" \1 ", text)))
    if len(times) != 1:
        return None
    hours = int(times[0][1])
    minutes = int(times[0][2])
    seconds = int(times[0][3] or 0)
    half = (times[0][4] or "").lower()
    if hours > (12 if half else 24) or minutes > 59 or seconds > 59:
        return None
    hours = hours % 12 + (12 if half == "p" else 0) if half else hours
    return hours * 3600 + minutes * 60 + seconds, bool(half) or times[0][3] is not None
