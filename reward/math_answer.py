r"""Whether a completion's mathematical answer equals the reference answer: math-verify decides, after the
notations that it misreads have been rewritten.

The comparison is strict, as a training signal requires: it rounds to math-verify's six decimals (more if the
reference has more, or is smaller), never searches a completion for the reference, and compares words as words
(math-verify multiplies letters, so that "seat" equals "east"). The verdict is computed only from the answer
that is logged.
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

from rltrain.reward import answer_notation, answer_text, answer_units, answer_words
from rltrain.reward.score import RewardInputs, Score, column_text, reward
from rltrain.reward.time_limit import TimeUp, cpu_time_limit

# math-verify warns that its own timeouts are off: the limits are set here and in the pool.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# math-verify takes the last letter of a formula for a unit, so that 4t would be 4; this module tells units
# from variables itself.
_LATEX = LatexExtractionConfig(
    normalization_config=dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
)
_NUMBER = re.compile(r"-?(?:\d{1,15}|\d{1,9}\.\d{1,6})")  # math-verify compares at most 15 digits
_DECIMALS = re.compile(r"\d*\.(\d+)")
_DEEPEST = 8  # levels of nested brackets that math-verify reads in a second or two
_LONG_NUMBER = re.compile(r"\d{40}")
_TOWER = re.compile(r"\^\s*\{?[^{}^]{0,20}\^|!\s*!|\d{4}\s*!|\^\s*\{?\s*\d{4}")
_REPEATED_PIECE = re.compile(r"(\D.{0,16}?)\1{11}", re.DOTALL)
_COMPRESSIBLE_LENGTH = 100
_COMPRESSION = 5


class Verdict(NamedTuple):
    """A verdict, and how it was reached."""

    is_right: bool
    decided_by: str  # a member of DECIDED_BY
    rules: frozenset[str] = frozenset()  # rules of notation without which the verdict might differ


# Rules that need both texts; each takes and returns (gold, answer).
_RULES_FOR_PAIRS = (
    ("unit", answer_units.remove_units),
    ("argument's name", answer_notation.unify_argument_name),
    ("one number", answer_notation.simplify_single_number),
    ("calculator", answer_notation.translate_calculator_notation),
)
DECIDED_BY = ("excess", "number", "same text", "choice", "words", "time of day", "base", "algebra")


@reward("math_answer", traits={"reports_correct", "reports_answer"})
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
    ``parts["correct"]`` is 1 or 0, whatever the two values are.

    Reads boxed, plain, LaTeX and text answers; a reference may be GSM8K's (``... #### 42``). DAPO's rewards
    are correct=1, wrong=-1. ``seconds`` limits the CPU time of one comparison; beyond it the completion is
    ungraded. The limit is a signal, which works only in the main thread and cannot interrupt a C call: the
    pool enforces hard limits. An answer that is far longer or far deeper nested than any reference is wrong
    without a comparison. With ``timeout`` "wrong", a degenerate answer (``is_degenerate``) that exceeds
    ``seconds`` is wrong too, because a policy may learn that a masked completion costs less than a wrong one.
    Raises ValueError if the answer column is missing.
    """
    gold = column_text(inputs, answer_column, "math_answer")
    return [_score(gold, completion, correct, wrong, seconds, timeout) for completion in inputs.completions]


def judge(gold: str, completion: str) -> bool:
    """Whether ``completion`` (a full completion or only an answer) states the answer ``gold``; without a time
    limit."""
    expected = answer_text.gold_part(gold)
    answer = _final_answer(expected, completion)
    return answer is not None and compare(expected, answer).is_right


def are_equivalent(first: str, second: str, seconds: float) -> bool:
    """Whether two answers are equal; False if the comparison exceeds ``seconds`` (see ``math_answer``)."""
    try:
        with cpu_time_limit(seconds):
            return compare(first, second).is_right
    except TimeUp:
        return False


def compare(gold: str, answer: str) -> Verdict:
    """Whether two answers are equal, and what decided it."""
    equal_numbers = _compare_numbers(gold, answer)
    if equal_numbers is not None:
        return Verdict(equal_numbers, "number")
    if _is_excessive(gold, answer):
        return Verdict(False, "excess")
    return _compare(gold, answer)


def is_degenerate(gold: str, answer: str) -> bool:
    """Whether the form of an answer makes it expensive to compare: it has a number of 40 digits or more, a
    tower of powers, or a factorial or power of thousands, and the reference has none."""
    return any(form.search(answer) and not form.search(gold) for form in (_LONG_NUMBER, _TOWER))


def warm_up() -> None:
    """Builds the LaTeX parser's tables and regular expressions (about a second) before the first training
    step."""
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
    answer = _final_answer(expected, completion)
    is_right = False
    if answer is not None:
        try:
            is_right = _compare_in_time(expected, answer, seconds).is_right
        except TimeUp:
            if timeout == "ungraded" or not is_degenerate(expected, answer):
                return Score(0.0, ungraded="timeout", answer=answer)
    return Score(correct if is_right else wrong, {"correct": float(is_right)}, answer=answer)


def _final_answer(expected: str, completion: str) -> str | None:
    return answer_text.final_answer(completion, in_words=answer_words.is_words(expected))


def _compare_in_time(gold: str, answer: str, seconds: float) -> Verdict:
    equal_numbers = _compare_numbers(gold, answer)
    if equal_numbers is not None:
        return Verdict(equal_numbers, "number")
    with cpu_time_limit(seconds):
        return compare(gold, answer)


def _compare_numbers(gold: str, answer: str) -> bool | None:
    """Whether two numbers are equal, without a parser, if both have at most 15 digits and 6 decimals, for
    which math-verify agrees; else None."""
    if not _NUMBER.fullmatch(gold) or not _NUMBER.fullmatch(answer):
        return None
    return Decimal(answer) == Decimal(gold)


def _is_excessive(gold: str, answer: str) -> bool:
    """Whether the answer is far longer or deeper nested than any reference, or repetitive unlike the
    reference."""
    if len(answer) > max(answer_text.LONGEST, 4 * len(gold)):
        return True
    if answer_notation.nesting_depth(answer) > max(_DEEPEST, answer_notation.nesting_depth(gold)):
        return True
    return _is_repetitive(answer) and not _is_repetitive(gold)


def _is_repetitive(text: str) -> bool:
    """Whether a short piece that is not a number repeats a dozen times in a row, or a long text compresses to
    a fraction of its size."""
    if _REPEATED_PIECE.search(text):
        return True
    if len(text) <= _COMPRESSIBLE_LENGTH:
        return False
    compressed = zlib.compress(text.encode(errors="replace"))
    return len(compressed) * _COMPRESSION < len(text)


@functools.lru_cache(maxsize=4096)
def _compare(gold: str, answer: str) -> Verdict:
    expected = answer_notation.to_plain_notation(gold)
    stated = answer_notation.to_plain_notation(answer)
    rules = expected.rules | stated.rules
    decided_by, is_right = _decide(expected.text, stated.text)
    if is_right is not None:
        return Verdict(is_right, decided_by, rules)

    pair = (expected.text, stated.text)
    for name, rule in _RULES_FOR_PAIRS:
        changed = rule(*pair)
        rules |= {name} if changed != pair else frozenset()
        pair = changed
    return Verdict(_are_equal(*pair), "algebra", rules)


def _decide(gold: str, answer: str) -> tuple[str, bool | None]:
    """What decides without algebra, and its verdict; None if algebra is needed."""
    if answer_notation.tokens(gold) == answer_notation.tokens(answer):
        return "same text", True
    letters = answer_words.choice_letters(gold)
    if letters:
        return "choice", letters == answer_words.chosen_letters(answer)
    if answer_words.is_words(gold):
        return "words", answer_words.same_words(gold, answer)
    clock = answer_words.clock_seconds(gold)
    if clock is not None:
        answer_clock = answer_words.clock_seconds(answer)
        same_time = answer_clock is not None and answer_clock[0] == clock[0]
        if clock[1] or same_time:
            return "time of day", same_time
    return "base", answer_units.same_numeral(gold, answer)


def _are_equal(gold: str, answer: str) -> bool:
    parsed = _parse_gold(gold)
    stated = _parse(answer_notation.add_delimiters(answer))
    decimals = _compared_decimals(gold, parsed)
    return bool(
        verify(parsed, stated, float_rounding=decimals, allow_set_relation_comp=True, timeout_seconds=0)
    )


def _compared_decimals(gold: str, parsed: list[Any]) -> int:
    """The number of decimals to compare: math-verify's six, or more if the reference has more decimals or
    needs more to show three digits of a small number."""
    decimals = max((len(digits) for digits in _DECIMALS.findall(gold)), default=0)
    value = parsed[0] if parsed else None
    if getattr(value, "is_number", False) and getattr(value, "is_real", False):
        size = abs(float(value))  # type: ignore[arg-type]
        if 0 < size < 1e-4:
            decimals = max(decimals, 2 - math.floor(math.log10(size)))
    return max(6, decimals)


@functools.lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    """The parsed reference. An undelimited formula is read as LaTeX in full or not at all: a number picked
    out of its middle is not the answer."""
    text = answer_notation.add_delimiters(gold)
    if text != gold:
        return parse(text, extraction_config=[_LATEX], parsing_timeout=0)
    return _parse(text)


def _parse(text: str) -> list[Any]:
    return parse(text, extraction_config=[_LATEX, ExprExtractionConfig()], parsing_timeout=0)
