"""No test fails because a machine is slow: what a clock says has no bound near what an idle machine needs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
CLOCKS = frozenset({"monotonic", "perf_counter", "time"})
LEAST_SECONDS = 60


def is_span(node: ast.expr) -> bool:
    """``time.monotonic() - started``"""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and isinstance(node.left, ast.Call)
        and isinstance(node.left.func, ast.Attribute)
        and node.left.func.attr in CLOCKS
    )


def short_bounds(tree: ast.AST) -> list[str]:
    """Every comparison in an assertion that a span of time, or a name for one, lies below a time that is not
    known to be long: a number, or a constant of the file.
    """
    numbers: dict[str, float] = {"PATIENCE": PATIENCE}
    spans: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if is_span(node.value):
            spans.add(node.targets[0].id)
        elif isinstance(node.value, ast.Constant) and isinstance(node.value.value, int | float):
            numbers[node.targets[0].id] = node.value.value

    def seconds(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        return numbers.get(node.id, 0.0) if isinstance(node, ast.Name) else 0.0

    asserted = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    bounds: list[str] = []
    for comparison in (node for test in asserted for node in ast.walk(test) if isinstance(node, ast.Compare)):
        sides = [comparison.left, *comparison.comparators]
        for left, operator, right in zip(sides, comparison.ops, sides[1:], strict=False):
            is_of_time = is_span(left) or (isinstance(left, ast.Name) and left.id in spans)
            if is_of_time and isinstance(operator, ast.Lt | ast.LtE) and seconds(right) < LEAST_SECONDS:
                bounds.append(f"line {comparison.lineno}: {ast.unparse(comparison)}")
    return bounds


@pytest.mark.parametrize(
    ("line", "is_short"),
    [
        ("assert time.monotonic() - started < 2.0", True),
        ("assert 0.4 <= time.perf_counter() - started < 3", True),
        ("assert done and time.monotonic() - started <= LIMITS.seconds + 3", True),
        ("assert time.monotonic() - started < PATIENCE", False),
        ("assert time.monotonic() - started > 1", False),
        ("assert time.monotonic() - started < 90", False),
        ("took = time.monotonic() - started\nassert took < 2", True),
        ("LIMIT = 5.0\nassert time.monotonic() - started < LIMIT", True),
        ("LIMIT = 75.0\nassert time.monotonic() - started < LIMIT", False),
    ],
)
def test_the_rule_sees_a_bound_that_only_an_idle_machine_keeps(line: str, is_short: bool) -> None:
    assert bool(short_bounds(ast.parse(line))) is is_short


def test_no_test_fails_because_a_machine_is_slow() -> None:
    """Let what must not be waited for last minutes, and count what happens instead."""
    bounds = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if (lines := short_bounds(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not bounds
