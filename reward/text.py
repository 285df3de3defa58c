r"""Rewards that compare strings: exact match, a multiple-choice letter, a required format.

Every expression here takes time linear in the completion: repetitions are possessive (``*+``) where the rest
of the expression could match the same text. A recipe's own expression (``format``) may be slower; the limit
reward.seconds then ends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Literal

from rltrain.reward.answer_text import answer_part, last_box
from rltrain.reward.score import RewardInputs, Score, column_text, reward

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})++|\d++)?(?:\.\d++)?")
_NUMBER_IN_TEXT = re.compile(r"(?:(?<![\w)\]])-)?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*+\{([^{}]*+)\}")
_ANSWER_PHRASE = r"(?i:answer)\s*+(?i:is:?+|:)\s*+(?i:(?:option|choice)\s++)?+"


@reward("exact", traits={"reports_correct", "reports_answer"})
def exact(
    inputs: RewardInputs,
    *,
    answer_column: str = "answer",
    ignore_case: bool = False,
    numbers: bool = False,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> list[Score]:
    """``correct`` if the stripped completion equals the stripped reference answer.

    numbers: compare as numbers if both are plain numbers, so that "1,000.0" is "1000".
    Raises ValueError if the answer column is missing.
    """
    gold = _normalize(column_text(inputs, answer_column, "exact"), ignore_case, numbers)
    answers = [_normalize(completion, ignore_case, numbers) for completion in inputs.completions]
    return [
        Score(
            correct if answer == gold else wrong,
            {"correct": float(answer == gold)},
            answer=str(answer) or None,
        )
        for answer in answers
    ]


@reward("last_number", traits={"reports_correct", "reports_answer"})
def last_number(
    inputs: RewardInputs,
    *,
    answer_column: str = "answer",
    correct: float = 1.0,
    wrong: float = 0.0,
) -> list[Score]:
    """``correct`` if the last number of the completion is the reference answer: "27 + 14 = 41".

    For problems whose question is an expression with the right value: ``math_answer`` takes "27 + 14" for an
    answer to "What is 27 + 14?", and a policy learns to repeat the question. Raises ValueError if the answer
    column is missing or holds no number.
    """
    text = column_text(inputs, answer_column, "last_number")
    gold = _last_number(text)
    if gold is None:
        raise ValueError(f"last_number: the answer {text!r:.80} holds no number; use math_answer or exact")
    answers = [_last_number(completion) for completion in inputs.completions]
    return [
        Score(
            correct if answer == gold else wrong,
            {"correct": float(answer == gold)},
            answer=None if answer is None else str(answer),
        )
        for answer in answers
    ]


@reward("choice", traits={"reports_correct", "reports_answer"})
def choice(
    inputs: RewardInputs,
    *,
    answer_column: str = "answer",
    letters: str = "ABCD",
    correct: float = 1.0,
    wrong: float = 0.0,
) -> list[Score]:
    r"""``correct`` if the chosen letter is the reference's ("B", "(B)" or "B."); ``parts["answered"]`` is 1
    if the completion chooses a letter.

    The search order is: the last box; the last "answer is (B)" or "Answer: B"; a completion or last line that
    is a letter ("B", "(B)", "B. Paris"); the last letter in parentheses. Letters are case-sensitive: "the
    answer is a cat" chooses nothing. Raises ValueError if the column is missing or holds no letter of
    ``letters``.
    """
    raw = column_text(inputs, answer_column, "choice")
    gold = re.fullmatch(rf"\(?([{re.escape(letters)}])[).:]*", raw.strip())
    if gold is None:
        raise ValueError(
            f"choice: column {answer_column!r} must hold one of the letters {letters}, got {raw!r}; set "
            "letters or answer_column"
        )
    chosen_letters = [chosen_letter(completion, letters) for completion in inputs.completions]
    return [
        Score(
            correct if letter == gold[1] else wrong,
            {"correct": float(letter == gold[1]), "answered": float(letter is not None)},
            answer=letter,
        )
        for letter in chosen_letters
    ]


def check_format(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    regex = values["regex"]
    if regex is None and not values["tags"]:
        yield "nothing is required; set regex, tags (for example [think, answer]) or both"
    if regex is not None:
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"regex {regex!r} is not a regular expression: {error}; in YAML put it in single quotes"


@reward("format", check=check_format)
def answer_format(
    inputs: RewardInputs,
    *,
    regex: str | None = None,
    match: Literal["full", "search"] = "full",
    tags: list[str] | None = None,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> list[Score]:
    """``correct`` if the completion has the required form.

    regex: in Python's syntax; the dot matches newlines. ``match`` "full" must match the stripped completion,
    "search" any part of it. tags: e.g. [think, answer]: <think>...</think> then <answer>...</answer>, in this
    order, each exactly once. Raises ValueError if neither is set or the expression is invalid.
    """
    if regex is None and not tags:
        raise ValueError("format: nothing is required; set regex, tags (for example [think, answer]) or both")
    pattern = _compile_format(regex) if regex is not None else None
    verdicts = [
        (pattern is None or _has_match(pattern, completion, match))
        and (not tags or has_tags(completion, tags))
        for completion in inputs.completions
    ]
    return [Score(correct if right else wrong, {"well_formed": float(right)}) for right in verdicts]


def chosen_letter(completion: str, letters: str) -> str | None:
    """The letter that a completion chooses, or None; ``choice`` gives the search order."""
    letter = rf"\(?+\s*+([{re.escape(letters)}])"
    text = _TEXT_COMMAND.sub(r"\1", answer_part(completion)).replace("**", "").replace("$", "")
    box = last_box(text)
    if box is not None:
        boxed = re.match(rf"\s*+{letter}(?![\w'])", box)
        return boxed[1] if boxed else None
    phrases = re.findall(rf"{_ANSWER_PHRASE}{letter}(?![\w'])(?!\s+[a-z])", text)
    if phrases:
        return phrases[-1]
    for line in (text.strip(), text.strip().rpartition("\n")[2]):
        labelled = re.match(rf"{letter}\s*+(?:$|(?:\)\s*+)?[.):](?:\s|$))", line)
        if labelled:
            return labelled[1]
    bracketed = re.findall(rf"\(([{re.escape(letters)}])\)", text)
    return bracketed[-1] if bracketed else None


def has_tags(text: str, tags: list[str]) -> bool:
    """Whether each tag opens once and closes once, one pair after the other, in the order of ``tags``."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    places = [text.find(mark) for mark in marks]
    return all(text.count(mark) == 1 for mark in marks) and places == sorted(places)


def _last_number(text: str) -> Decimal | None:
    """The last number of a text, without separators of thousands; a sign belongs to it where no digit, letter
    or bracket stands before."""
    numbers = _NUMBER_IN_TEXT.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _normalize(text: str, ignore_case: bool, numbers: bool) -> str | Decimal:
    stripped = text.strip()
    if numbers and _NUMBER.fullmatch(stripped) and any(character.isdigit() for character in stripped):
        return Decimal(stripped.replace(",", ""))
    return stripped.casefold() if ignore_case else stripped


def _compile_format(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"format: {regex!r} is not a regular expression: {error}") from error


def _has_match(pattern: re.Pattern[str], completion: str, match: Literal["full", "search"]) -> bool:
    return (
        pattern.fullmatch(completion.strip()) if match == "full" else pattern.search(completion)
    ) is not None
