"""A reward for whole programs: run them on the row's inputs and compare what they print."""

from __future__ import annotations

import dataclasses
import decimal
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reward import sandbox
from reward.code_text import program
from reward.sandbox import Limits, SandboxError, Tests, TestsError
from reward.score import RewardInputs, Score, reward

_NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?", re.ASCII)
_NOT_FINITE = re.compile(
    r"([+-]?)(inf(?:inity)?|nan)", re.IGNORECASE
)  # as C, Python, Java and JavaScript print them
_EXACT = decimal.Context(
    prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN
)  # no number that is written out is too large
_BEFORE = "before"  # the default of before_column, which a row need not have
_STDIN = frozenset({"stdin", "stdin_stdout", "stdio"})  # how data sets call tests of this kind


# What published sets of function calls mean by equal: JSON has no tuples, and some put every answer into a
# list of one. inf and nan are what they are written as in an assertion.
_SAME = """
import math as _math
from math import inf, nan

def _same(got, expected, tolerance=None):
    return _equal(got, expected, tolerance) or (
        isinstance(expected, list) and len(expected) == 1 and _equal(got, expected[0], tolerance)
    )

def _equal(got, expected, tolerance):
    if isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(_equal, got, expected, [tolerance] * len(got)))
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(_equal(got[key], expected[key], tolerance) for key in expected)
    if got == expected or not (_is_number(got) and _is_number(expected)):
        return got == expected
    if not (_math.isfinite(got) and _math.isfinite(expected)):
        return _math.isnan(got) and _math.isnan(expected)
    return tolerance is not None and abs(got - expected) <= tolerance * max(1.0, abs(expected))

def _is_number(value):
    return isinstance(value, float) or type(value) is int and abs(value) < 1 << 1000
"""
_METHOD = """
if {name!r} not in globals() and "Solution" in globals():
    def {name}(*arguments):
        return Solution().{name}(*arguments)
"""


@dataclass(frozen=True)
class Case:
    """One run: what the program reads, and what it should print."""

    given: str
    expected: str


@dataclass(frozen=True)
class Calls:
    """Assertions about the program's function ``name``, which may be a method of its class ``Solution``."""

    name: str
    assertions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.assertions)


class BadTests(Exception):
    """Nothing can be tested by the row's tests."""


@reward("code_io")
def code_io(
    inputs: RewardInputs,
    *,
    tests_column: str = "tests",
    before_column: str = "before",
    max_tests: int | None = None,
    tolerance: float | None = None,
    score: Literal["all", "share"] = "all",
    correct: float = 1.0,
    wrong: float = 0.0,
    seconds: float = 4.0,
    total_seconds: float = 8.0,
    memory_mib: int = 512,
    processes: int = 4,
    file_mib: int = 4,
    output_mib: int = 4,
    packages: bool = False,
    unsandboxed: bool = False,
) -> list[Score]:
    """``correct`` where the completion's program prints what the row's tests expect, as with APPS
    (arXiv:2105.09938), else ``wrong``.

    The program is the last Python block of the completion, or all of it where there is no fence. Every test
    runs it anew in a sandbox of its own (``reward.sandbox``), as ``__main__``, to its end with exit status 0.
    Printed and expected text are equal where their lines are, white space at the ends of lines and empty
    lines at the end apart. tests_column: a list of {"input", "output"}, or {"inputs": [...], "outputs":
    [...]}, or either as JSON; with an "fn_name" a test calls that function with the input, a list of
    arguments, and compares what it returns (as ``code_tests``). before_column: Python in front of the
    program, where the row has such a column. max_tests: the first so many; null: all. tolerance: of numbers,
    absolute or relative, whichever is larger; their lines must then have equal tokens, and infinite ones and
    NaN equal only themselves; null: text is compared. score "share": between wrong and correct by the share
    of tests passed; "all" stops at the first that fails. seconds: wall clock of one test; total_seconds: of
    all, beyond which the rest have failed; keep it below reward.seconds, as starting takes time (about 25 ms
    per test). memory_mib, processes, file_mib, packages, unsandboxed: as for ``code_tests``. output_mib: what
    a program may print.

    parts: correct (all tests), passed (share), no_code, timeout. Ungraded: "sandbox" (it did not start),
    "tests" (the row's expect nothing, or are of another kind). Raises ValueError where there are none, or no
    sandbox.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"code_io: tolerance must be a finite number of at least 0, got {tolerance}")
    kind = sandbox.choose_kind(unsandboxed)
    try:
        cases = _cases(inputs, tests_column, max_tests, tolerance)
    except BadTests as error:
        return [Score(0.0, ungraded="tests", why=str(error))] * len(inputs.completions)
    limits = Limits(seconds, memory_mib, processes, file_mib, output_mib)
    exam = Exam(cases, limits, total_seconds, tolerance, score == "share", kind, packages)
    before = _before(inputs, before_column)
    return [
        _score(program(completion, before, None, "auto"), exam, correct, wrong)
        for completion in inputs.completions
    ]


@dataclass(frozen=True)
class Exam:
    """What every completion of a prompt is put through."""

    cases: Sequence[Case] | Calls
    limits: Limits  # of one case
    seconds: float  # of all of them, starting not counted
    tolerance: float | None
    every: bool  # run what is left after a failure
    kind: sandbox.Kind
    packages: bool


def _score(source: str | None, exam: Exam, correct: float, wrong: float) -> Score:
    """correct, wrong: what all and none of the cases are worth."""
    if source is None:
        return Score(wrong, _parts(0.0, 0.0, 1.0, 0.0))
    try:
        passed, late = (
            _called(source, exam.cases, exam)
            if isinstance(exam.cases, Calls)
            else _passed(source, exam.cases, exam)
        )
    except (SandboxError, TestsError, OSError) as error:
        return Score(0.0, ungraded="tests" if isinstance(error, TestsError) else "sandbox", why=str(error))
    share, right = passed / len(exam.cases), float(passed == len(exam.cases))
    return Score(
        wrong + (correct - wrong) * (share if exam.every else right), _parts(right, share, 0.0, float(late))
    )


def _parts(correct: float, passed: float, no_code: float, timeout: float) -> dict[str, float]:
    return {"correct": correct, "passed": passed, "no_code": no_code, "timeout": timeout}


def _called(source: str, calls: Calls, exam: Exam) -> tuple[int, bool]:
    """How many assertions hold, and whether time ran out."""
    tests = Tests(calls.assertions, _SAME, None)
    limits = dataclasses.replace(exam.limits, seconds=exam.seconds)
    verdict = sandbox.judge(source + _METHOD.format(name=calls.name), tests, limits, exam.kind, exam.packages)
    return sum(verdict.passed), verdict.ended == "timeout"


def _passed(source: str, cases: Sequence[Case], exam: Exam) -> tuple[int, bool]:
    """How many cases the program passes, and whether time ran out in one."""
    passed, late, left = 0, False, exam.seconds
    for case in cases:
        limits = dataclasses.replace(exam.limits, seconds=min(exam.limits.seconds, left))
        ran = sandbox.run(source, case.given, limits, exam.kind, exam.packages)
        right = ran.ended == "done" and same_output(
            ran.printed.decode("utf-8", errors="replace"), case.expected, exam.tolerance
        )
        passed, late, left = passed + right, late or ran.ended == "timeout", left - ran.seconds
        if left <= 0 or not (right or exam.every):
            break
    return passed, late or left <= 0


def same_output(printed: str, expected: str, tolerance: float | None = None) -> bool:
    """Whether the lines are equal, white space at their ends and empty lines at the end apart.

    tolerance: numbers may differ by so much, absolutely or as a share of the expected one; then the tokens of
    a line are compared.
    """
    ours, theirs = _lines(printed), _lines(expected)
    if tolerance is None or len(ours) != len(theirs):
        return ours == theirs
    pairs = [(one.split(), other.split()) for one, other in zip(ours, theirs, strict=True)]
    return all(
        len(mine) == len(wanted)
        and all(_same_token(a, b, tolerance) for a, b in zip(mine, wanted, strict=True))
        for mine, wanted in pairs
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").rstrip().split("\n")]


def _same_token(printed: str, expected: str, tolerance: float) -> bool:
    if printed == expected:
        return True
    if _NUMBER.fullmatch(printed) and _NUMBER.fullmatch(expected):
        return _near(printed, expected, tolerance)
    ours, theirs = _NOT_FINITE.fullmatch(printed), _NOT_FINITE.fullmatch(expected)
    return ours is not None and theirs is not None and _spelled_alike(ours) == _spelled_alike(theirs)


def _near(printed: str, expected: str, tolerance: float) -> bool:
    """In decimals, as a float of more than 308 digits is infinite, and infinity is near to everything."""
    with decimal.localcontext(_EXACT):
        try:
            wanted = decimal.Decimal(expected)
            return abs(decimal.Decimal(printed) - wanted) <= decimal.Decimal(tolerance) * max(
                decimal.Decimal(1), abs(wanted)
            )
        except decimal.DecimalException:  # an exponent beyond any number's
            return False


def _spelled_alike(number: re.Match[str]) -> tuple[str, bool]:
    """Infinity with its sign, or NaN, which has none."""
    kind = number[2][:3].lower()
    return kind, kind == "inf" and number[1] == "-"


# the row's tests --------------------------------------------------------------------------------------------


def _cases(
    inputs: RewardInputs, column: str, most: int | None, tolerance: float | None
) -> list[Case] | Calls:
    """Raises ValueError where the column holds none, BadTests where it holds some of another kind, or
    that any program passes.
    """
    value = inputs.columns.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"code_io: column {column!r} is text, but no JSON: {value!r:.80} ({error})"
            ) from error
    if isinstance(value, Mapping):
        value = _rows_of(value)
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(item, Mapping) for item in value)
    ):
        there = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f'code_io: column {column!r} must hold a list of {{"input", "output"}}, got {value!r:.80}; the '
            f"row's columns are: {there}. "
            "Set tests_column or data.columns"
        )
    for item in value:
        if "input" not in item or "output" not in item:
            raise ValueError(f"code_io: a test must have input and output, got {sorted(item)}")
    if name := value[0].get("fn_name"):
        return _calls(str(name), value[:most], tolerance)
    cases = [_case(item) for item in value[:most]]
    if not any(case.expected.strip() for case in cases):
        raise BadTests(
            "no test of the row expects any output, so that every program would pass that prints nothing"
        )
    return cases


def _calls(name: str, tests: Sequence[Mapping[str, Any]], tolerance: float | None) -> Calls:
    if not name.isidentifier() or not all(
        isinstance(item["input"], list | tuple) and item.get("fn_name") == name for item in tests
    ):
        raise BadTests(f"the row's tests of {name!r:.40} are not of one function with lists of arguments")
    assertions = (
        f"assert _same({name}(*{list(item['input'])!r}), {item['output']!r}, {tolerance!r})" for item in tests
    )
    return Calls(name, tuple(assertions))


def _before(inputs: RewardInputs, column: str) -> str | None:
    """Raises ValueError where a column that the recipe names is not there; the default one need not be."""
    value = inputs.columns.get(column)
    if column not in inputs.columns and column != _BEFORE:
        there = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"code_io: the row has no column {column!r}; its columns are: {there}. Set before_column or "
            "data.columns"
        )
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"code_io: column {column!r} must hold the Python in front of the program as text, got "
            f"{value!r:.80}"
        )
    return value or None


def _rows_of(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tests that are kept by column, as APPS and CodeContests do."""
    named = {"fn_name": columns["fn_name"]} if columns.get("fn_name") else {}
    given, expected = (columns.get(f"{name}s", columns.get(name)) for name in ("input", "output"))
    if (
        not isinstance(given, list | tuple)
        or not isinstance(expected, list | tuple)
        or len(given) != len(expected)
    ):
        raise ValueError(
            f"code_io: inputs and outputs must be lists of equal length, got {given!r:.60} and "
            f"{expected!r:.60}"
        )
    return [{"input": one, "output": other, **named} for one, other in zip(given, expected, strict=True)]


def _case(item: Mapping[str, Any]) -> Case:
    called = item.get("type", item.get("testtype", "stdin"))
    if called not in _STDIN or item.get("fn_name"):
        raise BadTests(
            f"a test of the row is of the kind {called!r}, neither of a program that reads and prints nor of "
            "a named function"
        )
    return Case(_text(item["input"]), _text(item["output"]))


def _text(value: Any) -> str:
    """Text, or a list of its lines. Raises ValueError on anything else."""
    lines = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(
            f"code_io: input and output of a test must be text, or a list of lines, got {value!r:.80}"
        )
    return "\n".join(lines)
