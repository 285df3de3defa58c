"""``sql``: what a query returns decides, however it is written, and it can change and read nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.reward import sandbox
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.sql import equal_rows, find_query, sql

TABLES = """
CREATE TABLE city (name TEXT, people INTEGER, area REAL);
INSERT INTO city VALUES ('Ulm', 126, 118.7), ('Bonn', 330, 141.1), ('Kiel', 247, 118.7), ('Aue', NULL, 20.9);
"""
GOLD = "SELECT name FROM city WHERE people > 200"

try:
    sandbox.choose_kind(False)
except ValueError as error:
    pytest.skip(reason=f"no sandbox here to run queries in: {error}", allow_module_level=True)


def graded(*completions: str, answer: str = GOLD, tables: str = TABLES, **hp: object) -> list[Score]:
    count = len(completions)
    columns = {"answer": answer, "tables": tables}
    return sql(
        RewardInputs("q", completions, (1,) * count, ("stop",) * count, columns), **{"seconds": 20.0, **hp}
    )


def test_the_papers_rewards_for_a_right_a_wrong_and_an_invalid_query(tmp_path: Path) -> None:
    scores = graded(
        GOLD,
        "First I think.\n```sql\nSELECT c.name FROM city AS c WHERE NOT people <= 200 ORDER BY 1 DESC;\n```",
        "SELECT name FROM city",
        "SELECT title FROM city",
        "DROP TABLE city",  # the tables are read only
        "SELECT 1; SELECT 2",  # one statement
        f"ATTACH '{tmp_path}/file.db' AS other",  # there are no files
        "I do not know.",
        "",
    )
    assert [score.value for score in scores] == [1, 1, -1, -2, -2, -2, -2, -2, -2]
    assert [score.parts["valid"] for score in scores] == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert scores[0].parts["correct"] == 1 and not (tmp_path / "file.db").exists()


def test_order_counts_where_the_right_query_has_one() -> None:
    ordered = "SELECT name, people FROM city WHERE people IS NOT NULL ORDER BY people DESC"
    backwards = "SELECT name, people FROM city WHERE people > 0 ORDER BY people"
    assert [score.value for score in graded(ordered, backwards, answer=ordered)] == [1, -1]
    assert [score.value for score in graded(ordered, backwards, answer=ordered, order="ignore")] == [1, 1]


def test_a_query_without_end_is_wrong_and_an_endless_result_too() -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n{}) SELECT {} FROM n"
    endless, long = numbers.format("", "count(*)"), numbers.format(" LIMIT 500", "i")
    # the row's own query is short: it ends long before the limit
    scores = graded(endless, long, answer="SELECT count(*) FROM city", seconds=3.0, rows=100)
    assert [score.value for score in scores] == [-1, -1]
    assert [score.parts["timeout"] for score in scores] == [1, 1]


@pytest.mark.parametrize("row", [{"tables": "CREATE TABL city"}, {"answer": "SELECT nothing FROM city"}])
def test_a_row_that_does_not_run_is_ungraded(row: dict[str, str]) -> None:
    assert {score.ungraded for score in graded("SELECT 1", GOLD, **row)} == {"tests"}


@pytest.mark.parametrize(
    ("result", "expected", "is_equal"),
    [
        ([[1]], [[1.0]], True),
        ([[0.1 + 0.2]], [[0.3]], True),
        ([[0.3001]], [[0.3]], False),
        ([["1"]], [[1]], False),
        ([[None]], [[0]], False),
        ([[{"hex": "61"}]], [["61"]], False),
        ([["a"], ["a"], ["b"]], [["b"], ["a"], ["a"]], True),
        ([["a"], ["b"]], [["a"], ["a"], ["b"]], False),
        ([], [], True),
    ],
)
def test_rows_are_compared_by_value(result: list, expected: list, is_equal: bool) -> None:
    assert equal_rows(result, expected, in_order=False) is is_equal


@pytest.mark.parametrize(
    ("completion", "query"),
    [
        ("SELECT 1", "SELECT 1"),
        ("<think>SELECT 2</think> SELECT 1;", "SELECT 1;"),
        ("```python\nx\n```\n```SQL\nSELECT 1\n```\nthat is it", "SELECT 1"),
        ("```\nSELECT 1\n```\n```sql\nSELECT 2\n```", "SELECT 2"),
        (" \n", None),
    ],
)
def test_where_the_query_is_found(completion: str, query: str | None) -> None:
    assert find_query(completion) == query
