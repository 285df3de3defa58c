"""A reward for programs: run them against the row's tests, where they can do no harm and cannot see
what is expected.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from reward import sandbox
from reward.code_text import program
from reward.sandbox import Limits, SandboxError, Tests, TestsError
from reward.score import RewardInputs, Score, reward

_ENTRY = "entry_point"  # the default of entry_column, which a row need not have


@reward("code_tests")
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
    """``correct`` where the completion's program passes the row's tests, as with HumanEval
    (arXiv:2107.03374), else ``wrong``.

    tests_column: Python, or a list of it: scripts, main guards and ``unittest.main`` included, pytest's
    ``test*`` functions and classes (fixtures, parametrize, raises and approx are understood), unittest's
    TestCases, or a definition of ``check(candidate)``, which gets the function named in entry_column (where
    the row has that column; one that the recipe names must be there). Tests run in a process of their own
    that the program cannot reach and exchange plain data with it (numbers, text, bytes, lists, tuples, sets,
    dicts, None, iterators of them): what a function returns beside that fails, and so do tests that use the
    program's classes or what it prints. Names that the tests do not define are the program's, as is what they
    import from ``module``. A test that passes counts if it has called a function of the program or read a
    global of it that is none; naming a function is no call. Where no test counts, whatever the completions
    are, the row is ungraded. before_column: Python in front of the program, which the tests may use too;
    "prompt" is the prompt itself, as HumanEval's are. extract: where the program stands, see
    ``reward.code_text.program``. score "share": between wrong and correct by the share of tests passed.
    seconds: wall clock from loading to the last test; keep it below reward.seconds, as starting takes time.
    memory_mib: address space of each process; processes: with threads; file_mib: all it may write;
    message_mib: one call or answer. packages: importable is what is installed here, not just the standard
    library. unsandboxed: go on where the machine has no sandbox.

    parts: correct (all tests), passed (share), no_code, timeout. Ungraded: "sandbox" (it did not start),
    "tests" (the row's own fault: no Python, a module that is not there, no call of the program). Raises
    ValueError where a column is missing or there is no sandbox.
    """
    kind = sandbox.choose_kind(unsandboxed)
    entry = _entry(inputs, entry_column)
    before = None if before_column is None else _text(inputs, before_column)
    tests = Tests(_sources(inputs, tests_column), _executable(before or ""), entry, module)
    limits = Limits(seconds, memory_mib, processes, file_mib, message_mib)
    scores: list[Score] = []
    for completion in inputs.completions:
        source = program(completion, before, entry, extract)
        if source is None:
            scores.append(Score(wrong, _parts(0.0, 0.0, 1.0, 0.0)))
            continue
        try:
            verdict = sandbox.judge(source, tests, limits, kind, packages)
        except (SandboxError, TestsError, OSError) as error:
            scores.append(
                Score(0.0, ungraded="tests" if isinstance(error, TestsError) else "sandbox", why=str(error))
            )
            continue
        share, right = sum(verdict.passed) / len(verdict.passed), all(verdict.passed)
        parts = _parts(float(right), share, 0.0, float(verdict.ended == "timeout"))
        scores.append(Score(wrong + (correct - wrong) * (share if score == "share" else float(right)), parts))
    return scores


def _parts(correct: float, passed: float, no_code: float, timeout: float) -> dict[str, float]:
    return {"correct": correct, "passed": passed, "no_code": no_code, "timeout": timeout}


def _entry(inputs: RewardInputs, column: str | None) -> str | None:
    """The function that ``check`` gets; None where the row has none.

    Raises ValueError where the recipe's column is not there.
    """
    if column is None or (column == _ENTRY and column not in inputs.columns):
        return None
    if column in inputs.columns and inputs.columns[column] is None:
        return None
    name = _text(inputs, column)
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
        there = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"code_tests: column {column!r} must hold Python tests as text or a list of texts, got "
            f"{value!r:.80}; the row's columns "
            f"are: {there}. Set tests_column or data.columns"
        )
    return sources


def _executable(before: str) -> str:
    """What stands in front of the program as the tests may run it: a signature alone gets a body. Raises
    ValueError where it is no Python, as with a prompt that a chat template has been around."""
    for candidate in (before, f"{before}\n    pass\n"):
        with contextlib.suppress(SyntaxError, ValueError):
            compile(candidate, "before", "exec", dont_inherit=True)
            return candidate
    raise ValueError(
        f"code_tests: what stands before the program is no Python: {before[:80]!r}. Where a chat template "
        "stands around the prompt, keep "
        "its code in a column of its own, as in data.columns {prompt: prompt, code: prompt}, and set "
        "before_column: code"
    )


def _text(inputs: RewardInputs, column: str) -> str:
    """A column of text; "prompt" is the prompt where the row has no column of that name."""
    value = inputs.columns.get(column, inputs.prompt if column == "prompt" else None)
    if not isinstance(value, str):
        there = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"code_tests: column {column!r} must hold text, got {value!r:.80}; the row's columns are: "
            f"{there}. Set before_column, "
            "entry_column or data.columns"
        )
    return value
