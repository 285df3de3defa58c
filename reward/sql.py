"""A reward for SQL: runs the completion's query and the row's on the row's tables, in SQLite inside the
sandbox, and compares the results.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rltrain.reward import sandbox
from rltrain.reward.code_text import last_block
from rltrain.reward.sandbox import Limits, SandboxError
from rltrain.reward.score import RewardInputs, Score, column_text, reward

_SQL = frozenset({"", "sql", "sqlite", "sqlite3"})
_ORDERED = re.compile(r"\border\s+by\b[^()]*$", re.IGNORECASE)
_DIGITS = 9  # significant ones of a float: sums of floats depend on the order of rows

# The tables are in memory, and the query cannot change them. A query prints nothing, so that this alone says
# what it found.
_PROGRAM = """
import json, sqlite3, sys

task = json.load(sys.stdin)
tables = sqlite3.connect(":memory:")
tables.text_factory = lambda text: text.decode("utf-8", "replace")
tables.executescript(task["tables"])
tables.commit()
tables.execute("PRAGMA query_only = ON")
try:
    result = tables.execute(task["query"])
    rows = result.fetchmany(task["rows"] + 1)
    answer = {"rows": [[{"hex": c.hex()} if isinstance(c, bytes) else c for c in row] for row in rows]}
    if result.description is None:
        answer = {"error": "it returns no rows"}
except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
    answer = {"error": str(error)}
print(json.dumps(answer))
"""

Rows = list[list[Any]]


class _RowError(Exception):
    """The row's tables or its own query do not work."""


def check_queries(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    if 2 * values["seconds"] >= recipe.reward.seconds:
        yield (
            f"seconds is {values['seconds']:g} for each of two queries, but their process is ended after "
            f"reward.seconds {recipe.reward.seconds:g} and its completions stay ungraded; set reward.seconds "
            "above twice that"
        )


@reward("sql", traits={"reports_correct"}, check=check_queries)
def sql(
    inputs: RewardInputs,
    *,
    answer_column: str = "answer",
    tables_column: str = "tables",
    correct: float = 1.0,
    wrong: float = -1.0,
    invalid: float = -2.0,
    order: Literal["auto", "ignore"] = "auto",
    rows: int = 10_000,
    seconds: float = 4.0,
    memory_mib: int = 512,
    unsandboxed: bool = False,
) -> list[Score]:
    """``correct`` if the completion's query returns what the row's query returns, ``wrong`` if it returns
    something else, ``invalid`` if it is no query that runs: Seq2SQL's execution reward, arXiv:1709.00103.

    answer_column: the right query. tables_column: SQL that makes the tables and fills them; a completion's
    query cannot change them. The query is the last block fenced as SQL, or unmarked, else the whole
    completion; it is one statement. Rows are compared by position, not by the names of columns: in order if
    the right query ends with ORDER BY (order "auto"), else as a multiset. Numbers are equal to 9 significant
    digits, 1 equals 1.0, and text is compared as it is. Each query runs in a sandbox of its own
    (``rltrain.reward.sandbox``), without files; one that takes longer than ``seconds`` or returns more than
    ``rows`` rows is wrong. memory_mib: address space. unsandboxed: go on if the machine has no sandbox.

    parts: correct, valid, timeout. Ungraded: "sandbox" (it did not start), "tests" (the row's own tables or
    query do not run). Raises ValueError if a column is missing or there is no sandbox.
    """
    kind = sandbox.choose_kind(unsandboxed)
    answer = column_text(inputs, answer_column, "sql")
    tables = column_text(inputs, tables_column, "sql")
    limits = Limits(seconds, memory_mib, processes=4, file_mib=4, message_mib=16)

    def find(query: str) -> Rows | str:
        return _find_rows(query, tables, rows, limits, kind)

    try:
        expected = find(answer)
        if isinstance(expected, str):
            raise _RowError(f"the row's own query does not run on its tables: {expected}")
        in_order = order == "auto" and _ORDERED.search(answer.rstrip().rstrip(";")) is not None
        results = [None if query is None else find(query) for query in map(find_query, inputs.completions)]
    except (SandboxError, OSError, _RowError) as error:
        reason = "tests" if isinstance(error, _RowError) else "sandbox"
        return [Score(0.0, ungraded=reason, why=str(error))] * len(inputs.completions)

    scores = []
    for result in results:
        is_timeout = result == "timeout"
        is_valid = is_timeout or not (result is None or isinstance(result, str))
        is_right = isinstance(result, list) and equal_rows(result, expected, in_order=in_order)
        parts = {"correct": is_right, "valid": is_valid, "timeout": is_timeout}
        value = correct if is_right else wrong if is_valid else invalid
        scores.append(Score(value, {name: float(part) for name, part in parts.items()}))
    return scores


def find_query(completion: str) -> str | None:
    """The query in a completion, None if there is none. Text before a closing think tag does not count."""
    text = completion.rpartition("</think>")[2]
    query = last_block(text, _SQL)
    stripped = (text if query is None else query).strip()
    return stripped or None


def equal_rows(result: Rows, expected: Rows, *, in_order: bool) -> bool:
    """Whether two results hold the same rows."""
    left = [tuple(map(_comparable, row)) for row in result]
    right = [tuple(map(_comparable, row)) for row in expected]
    if in_order:
        return left == right
    return collections.Counter(left) == collections.Counter(right)


def _comparable(cell: Any) -> Any:
    """A value that is equal for equal cells: a number to 9 digits, a blob apart from a text."""
    if isinstance(cell, float) and math.isfinite(cell):
        rounded = float(f"{cell:.{_DIGITS}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 10**_DIGITS else rounded
    return ("blob", cell["hex"]) if isinstance(cell, dict) else cell


def _find_rows(query: str, tables: str, rows: int, limits: Limits, kind: sandbox.Kind) -> Rows | str:
    """What the query returns, or in words why it returns nothing that counts; "timeout" if it took too long,
    or returned too much.

    Raises SandboxError, and _RowError where the tables cannot be made.
    """
    task = json.dumps({"tables": tables, "query": query, "rows": rows})
    run = sandbox.run(_PROGRAM, task, limits, kind)
    if run.ended in ("timeout", "flood"):
        return "timeout"
    if run.ended == "failed":
        raise _RowError("the row's tables cannot be made: their SQL does not run")
    answer = json.loads(run.printed)
    result: Sequence[Any] = answer.get("rows", ())
    return "timeout" if len(result) > rows else list(result) if "rows" in answer else str(answer["error"])
