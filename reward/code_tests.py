"""A reward for programs: runs them against the row's tests in a sandbox, in which they can do no harm and
cannot see what is expected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

from rltrain.reward import sandbox
from rltrain.reward.code_text import extract_program
from rltrain.reward.recipe_rules import check_time_limit
from rltrain.reward.sandbox import Limits, SandboxError, Tests, TestsError
from rltrain.reward.score import RewardInputs, Score, reward

_DEFAULT_ENTRY_COLUMN = "entry_point"  # a row need not have this column


@reward("code_tests", traits={"reports_correct"}, check=check_time_limit)
def code_tests(
    inputs: RewardInputs,
    *,
    tests_column: str = "test",
    entry_column: str | None = "entry_point",
    before_column: str | None = None,
    module: str = "solution",
    extract: Literal["auto", "fenced", "continuation"] = "auto",
    score: Literal["all", "share"] = "all",
    correct: float = 1.0,
    wrong: float = 0.0,
    seconds: float = 4.0,
    memory_mib: int = 512,
    processes: int = 4,
    file_mib: int = 4,
    message_mib: int = 4,
    packages: bool = False,
    unsandboxed: bool = False,
) -> list[Score]:
    """``correct`` if the completion's program passes the row's tests, as with HumanEval
    (arXiv:2107.03374), else ``wrong``.

    tests_column: Python, or a list of Python texts: scripts, with main guards and ``unittest.main``; pytest's
    ``test*`` functions and classes (with fixtures, parametrize, raises and approx); unittest's TestCases; or
    a definition of ``check(candidate)``, which gets the function named in entry_column (if the row has that
    column; a column that the recipe names must exist). Tests run in a separate process that the program
    cannot reach, and exchange plain data with it (numbers, text, bytes, lists, tuples, sets, dicts, None,
    iterators of them): a function that returns anything else fails, and so do tests that use the program's
    classes or its output. Names that the tests do not define, or import from ``module``, are the program's. A
    passing test counts if it has called a function of the program or read another global of it; naming a
    function is not a call. If no test counts, whatever the completion, the row is ungraded. before_column:
    Python that precedes the program, which the tests may use too; "prompt" is the prompt itself, as in
    HumanEval. extract: how to find the program, see ``rltrain.reward.code_text.extract_program``. score
    "share": between wrong and correct in proportion to the passed tests. seconds: wall-clock limit from
    loading to the last test; keep it below reward.seconds, because starting takes time. memory_mib: address
    space of each process; processes: limit that includes threads; file_mib: limit of all that the program
    writes; message_mib: limit of one call or answer. packages: allow imports of packages installed here, not
    only of the standard library. unsandboxed: go on if the machine has no sandbox.

    parts: correct (all tests), passed (share), no_code, timeout. Ungraded: "sandbox" (it did not start),
    "tests" (the row's own fault: invalid Python, a missing module, no call of the program). Raises ValueError
    if a column is missing or there is no sandbox.
    """
    kind = sandbox.choose_kind(unsandboxed)
    entry = _entry_name(inputs, entry_column)
    before = None if before_column is None else _column_text(inputs, before_column)
    tests = Tests(_sources(inputs, tests_column), _complete_python(before or ""), entry, module)
    limits = Limits(seconds, memory_mib, processes, file_mib, message_mib)
    programs = [extract_program(completion, before, entry, extract) for completion in inputs.completions]

    def run(source: str) -> sandbox.Verdict:
        return sandbox.judge(source, tests, limits, kind, packages)

    return [_score(source, run, score, correct, wrong) for source in programs]


def _score(
    source: str | None,
    run: Callable[[str], sandbox.Verdict],
    score: Literal["all", "share"],
    correct: float,
    wrong: float,
) -> Score:
    if source is None:
        return Score(wrong, _parts(0.0, 0.0, 1.0, 0.0))
    try:
        verdict = run(source)
    except (SandboxError, TestsError, OSError) as error:
        return Score(0.0, ungraded="tests" if isinstance(error, TestsError) else "sandbox", why=str(error))
    share = sum(verdict.passed) / len(verdict.passed)
    all_passed = float(all(verdict.passed))
    value = wrong + (correct - wrong) * (share if score == "share" else all_passed)
    return Score(value, _parts(all_passed, share, 0.0, float(verdict.ended == "timeout")))


def _parts(correct: float, passed: float, no_code: float, timeout: float) -> dict[str, float]:
    return {"correct": correct, "passed": passed, "no_code": no_code, "timeout": timeout}


def _entry_name(inputs: RewardInputs, column: str | None) -> str | None:
    """The name of the function that ``check`` gets; None if the row has none.

    Raises ValueError if the recipe names a column that the row lacks.
    """
    if column is None or (column == _DEFAULT_ENTRY_COLUMN and column not in inputs.columns):
        return None
    if column in inputs.columns and inputs.columns[column] is None:
        return None
    name = _column_text(inputs, column)
    if not name.isidentifier():
        raise ValueError(
            f"code_tests: column {column!r} must hold the name of a function, got {name!r:.80}; set "
            "entry_column"
        )
    return name


def _sources(inputs: RewardInputs, column: str) -> tuple[str, ...]:
    value: Any = inputs.columns.get(column)
    sources = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not sources or not all(isinstance(source, str) and source.strip() for source in sources):
        columns = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"code_tests: column {column!r} must hold Python tests as text or a list of texts, got "
            f"{value!r:.80}; the row's columns are: {columns}. Set tests_column or data.columns"
        )
    return sources


def _complete_python(before: str) -> str:
    """The Python that precedes the program, made executable for the tests: a signature alone gets a body.

    Raises ValueError if it is not Python, as with a prompt inside a chat template.
    """
    for candidate in (before, f"{before}\n    pass\n"):
        with contextlib.suppress(SyntaxError, ValueError):
            compile(candidate, "before", "exec", dont_inherit=True)
            return candidate
    raise ValueError(
        f"code_tests: the text before the program is not Python: {before[:80]!r}. If a chat template "
        "encloses the prompt, keep the prompt's code in its own column, as in data.columns "
        "{prompt: prompt, code: prompt}, and set before_column: code"
    )


def _column_text(inputs: RewardInputs, column: str) -> str:
    """The text of a column; "prompt" is the prompt if the row has no column of that name."""
    value = inputs.columns.get(column, inputs.prompt if column == "prompt" else None)
    if not isinstance(value, str):
        columns = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"code_tests: column {column!r} must hold text, got {value!r:.80}; the row's columns are: "
            f"{columns}. Set before_column, entry_column or data.columns"
        )
    return value
