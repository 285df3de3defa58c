"""No test fails because a machine is slow: what a clock says has no bound near what an idle machine needs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLOCKS = frozenset({"monotonic", "perf_counter", "time"})
LEAST_SECONDS = 60
# names of bounds that are at least that long, and deadlines of a call that must not have been waited for
BOUNDS = frozenset({"PATIENCE", "START_SECONDS", "SECONDS", "PACE.seconds"})


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
    """Every comparison in an assertion that a span of time lies below a short time."""
    asserted = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    comparisons = [node for test in asserted for node in ast.walk(test) if isinstance(node, ast.Compare)]
    bounds: list[str] = []
    for comparison in comparisons:
        sides = [comparison.left, *comparison.comparators]
        for left, operator, right in zip(sides, comparison.ops, sides[1:], strict=False):
            if not is_span(left) or not isinstance(operator, ast.Lt | ast.LtE):
                continue
            bound = right.value if isinstance(right, ast.Constant) else None
            is_long = isinstance(bound, int | float) and bound >= LEAST_SECONDS
            if not is_long and ast.unparse(right) not in BOUNDS:
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
