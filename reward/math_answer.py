r"""Is a completion's mathematical answer the reference answer? On math-verify, with the notations that it
misreads made plain.

Strict where a training signal must be: no rounding beyond math-verify's six decimals (fewer where the
reference has more, or is smaller), no answer found by searching a completion for the reference, words
compared as words (math-verify multiplies letters, so that "seat" equals "east"). The verdict is computed from
the answer that is logged, and from nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
import zlib
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from reward import answer_notation, answer_text, answer_units, answer_words
from reward.score import RewardInputs, Score, column_text, reward
from reward.time_limit import TimeUp, cpu_time_limit

logging.getLogger("math_verify").setLevel(
    logging.ERROR
)  # it warns that its own timeouts are off: the limits are here and in the pool

# math-verify takes a last letter of a formula for a unit, so that 4t would be 4; units are told from
# variables here.
_LATEX = LatexExtractionConfig(
    normalization_config=dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
)
_NUMBER = re.compile(r"-?(?:\d{1,15}|\d{1,9}\.\d{1,6})")  # at most 15 digits: math-verify compares no more
_DECIMALS = re.compile(r"\d*\.(\d+)")
_DEEPEST = 8  # brackets in one another that math-verify still reads in a second or two
_LONG_NUMBER = re.compile(r"\d{40}")
_TOWER = re.compile(r"\^\s*\{?[^{}^]{0,20}\^|!\s*!|\d{4}\s*!|\^\s*\{?\s*\d{4}")
_REPEATED_PIECE = re.compile(r"(\D.{0,16}?)\1{11}", re.DOTALL)
_COMPRESSIBLE_LENGTH = 100
_COMPRESSION = 5


class Verdict(NamedTuple):
    """``right``, what decided (one of ``DECIDED_BY``), and the rules of notation without which it might be
    another verdict."""

    right: bool
    by: str
    rules: frozenset[str] = frozenset()


# What is no part of either's notation alone; each takes and gives (gold, answer).
_RULES_FOR_PAIRS = (
    ("unit", answer_units.without_units),
    ("argument's name", answer_notation.with_argument_named),
    ("one number", answer_notation.with_one_number),
    ("calculator", answer_notation.from_calculator),
)
DECIDED_BY = ("excess", "number", "same text", "choice", "words", "time of day", "base", "algebra")


@reward("math_answer")
def math_answer(
    inputs: RewardInputs,
    *,
    answer_column: str = "answer",
    correct: float = 1.0,
    wrong: float = 0.0,
    seconds: float = 5.0,
    timeout: Literal["ungraded", "wrong"] = "ungraded",
) -> list[Score]:
    r"""``correct`` or ``wrong`` by mathematical equality with the row's reference answer;
    ``parts["correct"]`` is 1 or 0 whatever they are.

    Reads boxed, plain, LaTeX and text answers; a reference may be GSM8K's (``... #### 42``). DAPO's rewards
    are correct=1, wrong=-1. ``seconds`` limits one comparison's CPU time where signals exist (main thread):
    the completion is then ungraded. Work inside one C call is beyond a signal, and a thread has none: hard
    limits are the pool's. An answer that is far longer or far deeper nested than any reference is wrong
    without a comparison. ``timeout`` "wrong": so is one that is degenerate (``is_degenerate``) and takes
    longer than ``seconds``, for a policy may learn that being masked beats being wrong. Raises ValueError
    where the answer column is missing.
    """
    gold = column_text(inputs, answer_column, "math_answer")
    return [_score(gold, completion, correct, wrong, seconds, timeout) for completion in inputs.completions]


def judge(gold: str, completion: str) -> bool:
    """Whether ``completion`` (a whole one or a bare answer) states the answer ``gold``. No time limit of its
    own."""
    expected = answer_text.gold_part(gold)
    answer = _answer(expected, completion)
    return answer is not None and compare(expected, answer).right


def equivalent(first: str, second: str, seconds: float) -> bool:
    """Whether two bare answers are equal. Those whose comparison takes longer than ``seconds`` (see
    ``math_answer``) count as different."""
    try:
        with cpu_time_limit(seconds):
            return compare(first, second).right
    except TimeUp:
        return False


def compare(gold: str, answer: str) -> Verdict:
    """Whether two bare answers are equal, and what decided it."""
    quick = _compare_numbers(gold, answer)
    if quick is not None:
        return Verdict(quick, "number")
    if _is_excessive(gold, answer):
        return Verdict(False, "excess")
    return _compare(gold, answer)


def is_degenerate(gold: str, answer: str) -> bool:
    """Whether an answer that is expensive to compare is so by its form: a number of 40 digits or more, a
    tower of powers, a factorial or power of thousands, where the reference has none."""
    return any(form.search(answer) and not form.search(gold) for form in (_LONG_NUMBER, _TOWER))


def warm_up() -> None:
    """Builds the LaTeX parser's tables and regular expressions (a second or so), so that the first training
    step does not."""
    judge("\\frac{1}{2}", "Thus it is $x = \\boxed{\\frac{3}{6}}$.")
    judge("12", "12 + 1")


def _score(
    gold: str,
    completion: str,
    correct: float,
    wrong: float,
    seconds: float,
    timeout: Literal["ungraded", "wrong"],
) -> Score:
    expected = answer_text.gold_part(gold)
    answer = _answer(expected, completion)
    right = False
    if answer is not None:
        try:
            right = _compare_in_time(expected, answer, seconds).right
        except TimeUp:
            if timeout == "ungraded" or not is_degenerate(expected, answer):
                return Score(0.0, ungraded="timeout", answer=answer)
    return Score(correct if right else wrong, {"correct": float(right)}, answer=answer)


def _answer(expected: str, completion: str) -> str | None:
    return answer_text.final_answer(completion, in_words=answer_words.is_words(expected))


def _compare_in_time(gold: str, answer: str, seconds: float) -> Verdict:
    quick = _compare_numbers(gold, answer)
    if quick is not None:
        return Verdict(quick, "number")
    with cpu_time_limit(seconds):
        return compare(gold, answer)


def _compare_numbers(gold: str, answer: str) -> bool | None:
    """Two plain numbers of at most 15 digits and 6 decimals: equal is equal, as math-verify has it, without a
    parser."""
    if not _NUMBER.fullmatch(gold) or not _NUMBER.fullmatch(answer):
        return None
    return Decimal(answer) == Decimal(gold)


def _is_excessive(gold: str, answer: str) -> bool:
    """Far longer or deeper nested than any reference, or a few characters over and over where the reference
    is not."""
    if len(answer) > max(answer_text.LONGEST, 4 * len(gold)):
        return True
    if answer_notation.depth(answer) > max(_DEEPEST, answer_notation.depth(gold)):
        return True
    return _is_repetitive(answer) and not _is_repetitive(gold)


def _is_repetitive(text: str) -> bool:
    """A short piece that is no number a dozen times in a row, or a long text that compresses to a fraction of
    itself."""
    if _REPEATED_PIECE.search(text):
        return True
    return len(text) > _COMPRESSIBLE_LENGTH and len(
        zlib.compress(text.encode(errors="replace"))
    ) * _COMPRESSION < len(text)


@functools.lru_cache(maxsize=4096)
def _compare(gold: str, answer: str) -> Verdict:
    expected, stated = answer_notation.plain(gold), answer_notation.plain(answer)
    rules = expected.rules | stated.rules
    by, right = _decide(expected.text, stated.text)
    if right is not None:
        return Verdict(right, by, rules)

    pair = (expected.text, stated.text)
    for name, rule in _RULES_FOR_PAIRS:
        changed = rule(*pair)
        rules |= {name} if changed != pair else frozenset()
        pair = changed
    return Verdict(_equal(*pair), "algebra", rules)


def _decide(gold: str, answer: str) -> tuple[str, bool | None]:
    """The verdict that needs no algebra, and what gave it; None where there is none."""
    if answer_notation.tokens(gold) == answer_notation.tokens(answer):
        return "same text", True
    letters = answer_words.choices(gold)
    if letters:
        return "choice", letters == answer_words.chosen(answer)
    if answer_words.is_words(gold):
        return "words", answer_words.same_words(gold, answer)
    clock = answer_words.clock_seconds(gold)
    if clock is not None:
        same = answer_words.clock_seconds(answer)
        if clock[1] or (same is not None and same[0] == clock[0]):
            return "time of day", same is not None and same[0] == clock[0]
    return "base", answer_units.same_numeral(gold, answer)


def _equal(gold: str, answer: str) -> bool:
    parsed = _parse_gold(gold)
    stated = _parse(answer_notation.delimited(answer))
    decimals = _decimals_compared(gold, parsed)
    return bool(
        verify(parsed, stated, float_rounding=decimals, allow_set_relation_comp=True, timeout_seconds=0)
    )


def _decimals_compared(gold: str, parsed: list[Any]) -> int:
    """math-verify's six, as many as a decimal reference has, or as many as show three digits of a small
    number."""
    written = max((len(digits) for digits in _DECIMALS.findall(gold)), default=0)
    value = parsed[0] if parsed else None
    if getattr(value, "is_number", False) and getattr(value, "is_real", False):
        size = abs(float(value))  # type: ignore[arg-type]
        if 0 < size < 1e-4:
            written = max(written, 2 - math.floor(math.log10(size)))
    return max(6, written)


@functools.lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    """A bare formula is read as LaTeX as a whole or not at all: a number picked out of its middle is not the
    answer."""
    text = answer_notation.delimited(gold)
    if text != gold:
        return parse(text, extraction_config=[_LATEX], parsing_timeout=0)
    return _parse(text)


def _parse(text: str) -> list[Any]:
    return parse(text, extraction_config=[_LATEX, ExprExtractionConfig()], parsing_timeout=0)
