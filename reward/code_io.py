"""A reward for complete programs: runs them on the row's inputs and compares what they print."""

from __future__ import annotations

import dataclasses
import decimal
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rltrain.reward import sandbox
from rltrain.reward.code_text import extract_program
from rltrain.reward.recipe_rules import check_time_limit
from rltrain.reward.sandbox import Limits, SandboxError, Tests, TestsError
from rltrain.reward.score import RewardInputs, Score, reward

_NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?", re.ASCII)
# As C, Python, Java and JavaScript print these numbers.
_NOT_FINITE = re.compile(r"([+-]?)(inf(?:inity)?|nan)", re.IGNORECASE)
# No number that is written out exceeds this context.
_EXACT = decimal.Context(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
_DEFAULT_BEFORE_COLUMN = "before"  # a row need not have this column
_STDIN = frozenset({"stdin", "stdin_stdout", "stdio"})  # names of this kind of test in data sets


# Equality as published sets of function calls mean it: JSON has no tuples, and some sets put every answer
# into a list of one element. An assertion writes infinity and NaN as inf and nan.
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
        return got.keys() == expected.keys() and all(
            _equal(got[key], expected[key], tolerance) for key in expected
        )
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
    """One run of the program: its standard input and its expected output."""

    input_text: str
    expected: str


@dataclass(frozen=True)
class Calls:
    """Assertions about the program's function ``name``, which may be a method of its class ``Solution``."""

    name: str
    assertions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.assertions)


class BadTests(Exception):
    """The row's tests cannot test anything."""


def check_total_time(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    return check_time_limit(values, recipe, "total_seconds")


@reward("code_io", traits={"reports_correct"}, check=check_total_time)
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
    """``correct`` if the completion's program prints what the row's tests expect, as with APPS
    (arXiv:2105.09938), else ``wrong``.

    The program is the last Python block of the completion, or the whole completion if it has no fence. Every
    test runs the program again in its own sandbox (``rltrain.reward.sandbox``), as ``__main__``; the program
    must end with exit status 0. Printed and expected text are equal if their lines are equal, except for
    white space at the ends of lines and empty lines at the end. tests_column: a list of {"input", "output"},
    or {"inputs": [...], "outputs": [...]}, or either as JSON; with an "fn_name" a test calls that function
    with the input, a list of arguments, and compares the returned value (like ``code_tests``). before_column:
    Python that precedes the program, if the row has such a column. max_tests: number of tests, from the
    first; null: all. tolerance: for numbers, absolute or relative, whichever is larger; the lines must then
    have equal tokens, and infinity and NaN equal only themselves; null: compare as text. score "share":
    between wrong and correct in proportion to the passed tests; "all" stops at the first failure. seconds:
    wall-clock limit of one test; total_seconds: limit of all tests, beyond which the remaining tests fail;
    keep it below reward.seconds, because starting takes time (about 25 ms per test). memory_mib, processes,
    file_mib, packages, unsandboxed: as for ``code_tests``. output_mib: limit of what a program prints.

    parts: correct (all tests), passed (share), no_code, timeout. Ungraded: "sandbox" (it did not start),
    "tests" (the row's tests expect nothing, or are of another kind). Raises ValueError if there are no tests
    or no sandbox.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"code_io: tolerance must be a finite number of at least 0, got {tolerance}")
    kind = sandbox.choose_kind(unsandboxed)
    try:
        cases = _read_tests(inputs, tests_column, max_tests, tolerance)
    except BadTests as error:
        return [Score(0.0, ungraded="tests", why=str(error))] * len(inputs.completions)
    limits = Limits(seconds, memory_mib, processes, file_mib, output_mib)
    plan = TestPlan(cases, limits, total_seconds, tolerance, score == "share", kind, packages)
    before = _leading_code(inputs, before_column)
    programs = [extract_program(completion, before, None, "auto") for completion in inputs.completions]
    return [_score(source, plan, correct, wrong) for source in programs]


@dataclass(frozen=True)
class TestPlan:
    """The tests and limits for every completion of a prompt."""

    cases: Sequence[Case] | Calls
    limits: Limits  # for one case
    seconds: float  # for all cases, without starting sandboxes
    tolerance: float | None
    run_all: bool  # whether to run the remaining cases after a failure
    kind: sandbox.Kind
    packages: bool


def _score(source: str | None, plan: TestPlan, correct: float, wrong: float) -> Score:
    """correct, wrong: the values of passing all cases and none."""
    if source is None:
        return Score(wrong, _parts(0.0, 0.0, 1.0, 0.0))
    try:
        if isinstance(plan.cases, Calls):
            passed, is_late = _count_passed_calls(source, plan.cases, plan)
        else:
            passed, is_late = _count_passed_cases(source, plan.cases, plan)
    except (SandboxError, TestsError, OSError) as error:
        return Score(0.0, ungraded="tests" if isinstance(error, TestsError) else "sandbox", why=str(error))
    share = passed / len(plan.cases)
    all_passed = float(passed == len(plan.cases))
    value = wrong + (correct - wrong) * (share if plan.run_all else all_passed)
    return Score(value, _parts(all_passed, share, 0.0, float(is_late)))


def _parts(correct: float, passed: float, no_code: float, timeout: float) -> dict[str, float]:
    return {"correct": correct, "passed": passed, "no_code": no_code, "timeout": timeout}


def _count_passed_calls(source: str, calls: Calls, plan: TestPlan) -> tuple[int, bool]:
    """How many assertions hold, and whether time ran out."""
    tests = Tests(calls.assertions, _SAME, None)
    limits = dataclasses.replace(plan.limits, seconds=plan.seconds)
    verdict = sandbox.judge(source + _METHOD.format(name=calls.name), tests, limits, plan.kind, plan.packages)
    return sum(verdict.passed), verdict.ended == "timeout"


def _count_passed_cases(source: str, cases: Sequence[Case], plan: TestPlan) -> tuple[int, bool]:
    """How many cases the program passes, and whether time ran out in one."""
    passed = 0
    is_late = False
    seconds_left = plan.seconds
    for case in cases:
        limits = dataclasses.replace(plan.limits, seconds=min(plan.limits.seconds, seconds_left))
        result = sandbox.run(source, case.input_text, limits, plan.kind, plan.packages)
        is_right = result.ended == "done" and same_output(
            result.printed.decode("utf-8", errors="replace"), case.expected, plan.tolerance
        )
        passed += is_right
        is_late = is_late or result.ended == "timeout"
        seconds_left -= result.seconds
        if seconds_left <= 0 or not (is_right or plan.run_all):
            break
    return passed, is_late or seconds_left <= 0


def same_output(printed: str, expected: str, tolerance: float | None = None) -> bool:
    """Whether the lines are equal, except for white space at their ends and empty lines at the end.

    tolerance: numbers may differ by so much, absolutely or relative to the expected number; then the lines
    are compared by tokens.
    """
    printed_lines = _lines(printed)
    expected_lines = _lines(expected)
    if tolerance is None or len(printed_lines) != len(expected_lines):
        return printed_lines == expected_lines
    return all(
        _is_same_line(printed_line.split(), expected_line.split(), tolerance)
        for printed_line, expected_line in zip(printed_lines, expected_lines, strict=True)
    )


def _is_same_line(printed: Sequence[str], expected: Sequence[str], tolerance: float) -> bool:
    return len(printed) == len(expected) and all(
        _is_same_token(printed_token, expected_token, tolerance)
        for printed_token, expected_token in zip(printed, expected, strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").rstrip().split("\n")]


def _is_same_token(printed: str, expected: str, tolerance: float) -> bool:
    if printed == expected:
        return True
    if _NUMBER.fullmatch(printed) and _NUMBER.fullmatch(expected):
        return _is_close(printed, expected, tolerance)
    printed_match = _NOT_FINITE.fullmatch(printed)
    expected_match = _NOT_FINITE.fullmatch(expected)
    if printed_match is None or expected_match is None:
        return False
    return _non_finite_kind(printed_match) == _non_finite_kind(expected_match)


def _is_close(printed: str, expected: str, tolerance: float) -> bool:
    """Whether two numbers agree within ``tolerance``, computed in decimals: as a float, a number of more than
    308 digits is infinite, and every number would be close to it."""
    with decimal.localcontext(_EXACT):
        try:
            expected_number = decimal.Decimal(expected)
            margin = decimal.Decimal(tolerance) * max(decimal.Decimal(1), abs(expected_number))
            return abs(decimal.Decimal(printed) - expected_number) <= margin
        except decimal.DecimalException:  # an exponent that is too large
            return False


def _non_finite_kind(number: re.Match[str]) -> tuple[str, bool]:
    """The kind of number: infinity with its sign, or NaN, which has none."""
    kind = number[2][:3].lower()
    return kind, kind == "inf" and number[1] == "-"


# the row's tests --------------------------------------------------------------------------------------------


def _read_tests(
    inputs: RewardInputs, column: str, max_tests: int | None, tolerance: float | None
) -> list[Case] | Calls:
    """The row's tests. Raises ValueError if the column holds none, BadTests if they are of another kind, or
    if every program passes them.
    """
    value = inputs.columns.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"code_io: column {column!r} is text, but not JSON: {value!r:.80} ({error})"
            ) from error
    if isinstance(value, Mapping):
        value = _tests_by_row(value)
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(item, Mapping) for item in value)
    ):
        columns = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f'code_io: column {column!r} must hold a list of {{"input", "output"}}, got {value!r:.80}; the '
            f"row's columns are: {columns}. Set tests_column or data.columns"
        )
    for item in value:
        if "input" not in item or "output" not in item:
            raise ValueError(f"code_io: a test must have input and output, got {sorted(item)}")
    if name := value[0].get("fn_name"):
        return _read_calls(str(name), value[:max_tests], tolerance)
    cases = [_read_case(item) for item in value[:max_tests]]
    if not any(case.expected.strip() for case in cases):
        raise BadTests("no test of the row expects any output: a program that prints nothing would pass")
    return cases


def _read_calls(name: str, tests: Sequence[Mapping[str, Any]], tolerance: float | None) -> Calls:
    if not name.isidentifier() or not all(
        isinstance(item["input"], list | tuple) and item.get("fn_name") == name for item in tests
    ):
        raise BadTests(f"the row's tests of {name!r:.40} are not of one function with lists of arguments")
    assertions = (
        f"assert _same({name}(*{list(item['input'])!r}), {item['output']!r}, {tolerance!r})" for item in tests
    )
    return Calls(name, tuple(assertions))


def _leading_code(inputs: RewardInputs, column: str) -> str | None:
    """The Python that precedes the program. Raises ValueError if the recipe names a column that the row
    lacks; the row need not have the default column."""
    value = inputs.columns.get(column)
    if column not in inputs.columns and column != _DEFAULT_BEFORE_COLUMN:
        columns = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"code_io: the row has no column {column!r}; its columns are: {columns}. Set before_column or "
            "data.columns"
        )
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"code_io: column {column!r} must hold the Python that precedes the program as text, got "
            f"{value!r:.80}"
        )
    return value or None


def _tests_by_row(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tests by row, from tests by column as in APPS and CodeContests."""
    named = {"fn_name": columns["fn_name"]} if columns.get("fn_name") else {}
    inputs = columns.get("inputs", columns.get("input"))
    outputs = columns.get("outputs", columns.get("output"))
    if (
        not isinstance(inputs, list | tuple)
        or not isinstance(outputs, list | tuple)
        or len(inputs) != len(outputs)
    ):
        raise ValueError(
            f"code_io: inputs and outputs must be lists of equal length, got {inputs!r:.60} and "
            f"{outputs!r:.60}"
        )
    return [
        {"input": test_input, "output": output, **named}
        for test_input, output in zip(inputs, outputs, strict=True)
    ]


def _read_case(item: Mapping[str, Any]) -> Case:
    kind = item.get("type", item.get("testtype", "stdin"))
    if kind not in _STDIN or item.get("fn_name"):
        raise BadTests(
            f"a test of the row is of the kind {kind!r}; expected a program that reads and prints, or a "
            "named function"
        )
    return Case(_join_lines(item["input"]), _join_lines(item["output"]))


def _join_lines(value: Any) -> str:
    """The text of a value that is text or a list of lines. Raises ValueError on anything else."""
    lines = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(
            f"code_io: input and output of a test must be text, or a list of lines, got {value!r:.80}"
        )
    return "\n".join(lines)
