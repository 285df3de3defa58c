"""The comparison's rows, marks, bands and links."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rltrain.analysis.comparison import Comparison
from rltrain.analysis.curves import Curves, Spread
from rltrain.analysis.pages.comparison_page import comparison_page, list_rows, mark_of, write_comparison
from rltrain.analysis.pages.run_page import write_missing_report
from support.report_runs import write_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods of two seeds; the second method ends 0.1 higher, or 0.12 with the other seed."""
    root = tmp_path_factory.mktemp("compared")
    for seed in range(2):
        write_run(root / f"grpo/seed-{seed}", shift=0.02 * seed)
        write_run(root / f"cov/seed-{seed}", shift=0.1 + 0.04 * seed)
    write_missing_report(root / "cov/seed-0")
    return root


@pytest.fixture(scope="module")
def comparison(root: Path) -> Comparison:
    runs = {
        name: [Curves.read(root / name / f"seed-{seed}") for seed in range(2)] for name in ("grpo", "cov")
    }
    return Comparison("grpo and <cov>", ("profile tiny_cpu",), runs)


@pytest.mark.parametrize(
    ("low", "high", "direction", "mark"),
    [
        (0.1, 0.3, 1, "good"),
        (-0.3, -0.1, 1, "bad"),
        (-0.3, -0.1, -1, "good"),
        (-0.1, 0.3, 1, "none"),
        (0.1, 0.3, 0, "none"),
        (math.nan, math.nan, 1, ""),
    ],
)
def test_a_difference_is_marked_where_its_interval_has_one_sign(
    low: float, high: float, direction: int, mark: str
) -> None:
    assert mark_of(Spread((low + high) / 2, low, high), direction) == mark


def test_a_row_has_value_start_difference_and_links(comparison: Comparison, root: Path) -> None:
    grpo, cov = list_rows(comparison, root / "out")
    assert grpo.is_reference and [cell.label for cell in cov.cells] == ["pass@1", "entropy kept"]
    accuracy = cov.cells[0]
    assert accuracy.after is not None and accuracy.after.value == pytest.approx(0.82)
    assert accuracy.before is not None and accuracy.before.value == pytest.approx(0.4)
    assert accuracy.difference is not None and accuracy.difference.value == pytest.approx(0.11)
    assert grpo.cells[0].difference is None
    assert cov.runs == (("seed-0", "../cov/seed-0/report.html"), ("seed-1", None))
    assert cov.touched == (("clip_cov", pytest.approx(0.02)),) and cov.minutes == 5.0


def test_the_page_links_to_the_runs_and_names_the_methods(comparison: Comparison, root: Path) -> None:
    text = comparison_page(comparison, root / "out")
    assert "grpo and &lt;cov&gt;" in text and 'href="../cov/seed-0/report.html"' in text
    assert "paired by seed" in text and "profile tiny_cpu" in text
    assert "paired by seed" not in comparison_page(
        Comparison("one", (), {"grpo": comparison.methods["grpo"]}), root / "out"
    )


def test_everything_is_written_side_by_side(comparison: Comparison, tmp_path: Path) -> None:
    made = write_comparison(comparison, tmp_path / "out")
    assert [path.name for path in made] == ["comparison.md", "comparison.png", "comparison.html"]
    assert made[1].read_bytes().startswith(b"\x89PNG")
    assert made[2].read_text().startswith("<!doctype html>")
