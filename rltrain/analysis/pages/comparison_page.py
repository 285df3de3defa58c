"""comparison.html: methods side by side, with their differences from the first and a mark on each."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.analysis.comparison import (
    LAW,
    Comparison,
    entropy_difference,
    figure,
    list_panels,
    markdown,
    paired_seeds,
    reading_notes,
)
from rltrain.analysis.curves import (
    Curves,
    Spread,
    mean_over_runs,
    moving_mean,
    range_of,
    student_mean,
)
from rltrain.analysis.pages.charts import POINTS, law_data, round_value, smoothing_width, thin_steps
from rltrain.analysis.pages.render import render_page
from rltrain.analysis.pages.summary import direction_of

SMOOTHED_SHARE = 15  # a curve averages over this part of the steps: several are to be told apart


@dataclass(frozen=True)
class Cell:
    """A measure of one method: its value, what it was before training, its difference from the reference."""

    label: str
    after: Spread | None
    before: Spread | None
    difference: Spread | None
    mark: str  # "good", "bad", "none" (the interval holds 0), or "" where no interval says anything


@dataclass(frozen=True)
class Row:
    method: str
    is_reference: bool
    runs: tuple[tuple[str, str | None], ...]  # (label, link to its page or None)
    cells: tuple[Cell, ...]
    touched: tuple[tuple[str, float], ...]  # (control, mean share of tokens)
    minutes: float


def comparison_page(comparison: Comparison, folder: Path) -> str:
    """The page as it stands in ``folder``, from where it links to the runs' own pages."""
    parts = comparison.parts
    charts = [
        _chart(part, metric, title) for part in parts for metric, title in list_panels(part) if metric != LAW
    ]
    longest = max(len(run.steps) for runs in comparison.methods.values() for run in runs)
    laws = {name: law for name, runs in comparison.methods.items() if (law := law_data(runs[0])) is not None}
    return render_page(
        "comparison.html.j2",
        title=comparison.title,
        name=comparison.title,
        conditions=(*comparison.conditions, *reading_notes(comparison)),
        parts=[(part.title if len(parts) > 1 else "", list_rows(part, folder)) for part in parts],
        smoothing=smoothing_width(longest, SMOOTHED_SHARE),
        is_thinned=longest > POINTS,
        data={"charts": charts, "laws": laws},
    )


def list_rows(comparison: Comparison, folder: Path) -> list[Row]:
    """One row for each method of one kind; differences are paired by seed."""
    reference = next(iter(comparison.methods.values()))
    return [
        Row(
            method,
            runs is reference,
            tuple((_run_label(run, number), _link(run, folder)) for number, run in enumerate(runs)),
            tuple(_cells(comparison, runs, reference)),
            _mean_shares(runs),
            sum(run.minutes for run in runs),
        )
        for method, runs in comparison.methods.items()
    ]


def _cells(comparison: Comparison, runs: Sequence[Curves], reference: Sequence[Curves]) -> list[Cell]:
    cells = []
    for measure in comparison.measures:
        difference = None if runs is reference else paired_seeds(runs, reference, measure)
        cells.append(
            Cell(
                measure.partition("/")[2].replace("_", " "),
                mean_over_runs(runs, lambda run, name=measure: run.final(name), range_of(measure)),
                mean_over_runs(runs, lambda run, name=measure: run.first(name), range_of(measure)),
                difference,
                mark_of(difference, direction_of(measure)),
            )
        )
    kept = student_mean([run.entropy_kept for run in runs], (0.0, math.inf))
    difference = None if runs is reference else entropy_difference(runs, reference)
    cells.append(Cell("entropy kept", kept, None, difference, mark_of(difference, 0)))
    ceiling = mean_over_runs(runs, Curves.ceiling)
    if any(run.ceiling() is not None for method in comparison.methods.values() for run in method):
        cells.append(Cell("law's ceiling", ceiling, None, None, ""))
    return cells


def mark_of(difference: Spread | None, direction: int) -> str:
    """What the interval of a difference says. direction: as of ``direction_of``."""
    if difference is None or math.isnan(difference.low):
        return ""
    if difference.low <= 0 <= difference.high or direction == 0:
        return "none"
    return "good" if (difference.value > 0) == (direction > 0) else "bad"


def _run_label(run: Curves, number: int) -> str:
    return run.folder.name if run.folder is not None else f"run {number + 1}"


def _link(run: Curves, folder: Path) -> str | None:
    """The run's own page as a path from ``folder``; None if there is none."""
    if run.folder is None or not (run.folder / "report.html").is_file():
        return None
    return Path(os.path.relpath(run.folder.absolute() / "report.html", folder.absolute())).as_posix()


def _mean_shares(runs: Sequence[Curves]) -> tuple[tuple[str, float], ...]:
    shares = [run.touched_shares() for run in runs]
    names = sorted(set().union(*shares))
    return tuple((name, sum(share.get(name, 0.0) for share in shares) / len(shares)) for name in names)


def _chart(comparison: Comparison, metric: str, title: str) -> dict[str, Any]:
    """Each method's mean over its seeds, with the range of its seeds as a band; methods that are equal at
    every step are one curve, with both names.
    """
    columns = {
        name: _mean_and_range(runs, metric)
        for name, runs in comparison.methods.items()
        if any(run.series(metric)[0] for run in runs)
    }
    labels: dict[str, str] = {}  # by the method whose curve is drawn
    for name, column in columns.items():
        twin = next((other for other in labels if columns[other] == column), None)
        labels[twin or name] = name if twin is None else f"{labels[twin]}, {name}"
    means = {name: {step: mean for step, (mean, _, _) in columns[name].items()} for name in labels}
    steps = thin_steps(sorted(set().union(*means.values())), list(means.values()))
    positions = {name: place for place, name in enumerate(comparison.methods)}

    def values(name: str, place: int) -> list[float | None]:
        return [round_value(columns[name][step][place]) if step in columns[name] else None for step in steps]

    def band(name: str) -> dict[str, list[float | None]]:
        return {"low": values(name, 1), "high": values(name, 2)} if len(comparison.methods[name]) > 1 else {}

    return {
        "title": title,
        "unit": "",
        "about": "mean over seeds; band: from the lowest to the highest seed",
        "log": False,
        "x": steps,
        "lines": [
            {
                "label": label,
                "colour": positions[name],
                "values": values(name, 0),
                **band(name),
                "sparse": metric.startswith("eval/"),
            }
            for name, label in labels.items()
        ],
    }


def _mean_and_range(runs: Sequence[Curves], metric: str) -> dict[int, tuple[float, float, float]]:
    """(mean, lowest, highest) over the seeds at each step that all of them logged; training metrics are
    averaged over neighbouring steps first.
    """
    curves = []
    for run in runs:
        steps, values = run.series(metric)
        width = 1 if metric.startswith("eval/") else smoothing_width(len(run.steps), SMOOTHED_SHARE)
        curves.append(dict(zip(steps, moving_mean(values, width), strict=True)))
    common = set(curves[0]).intersection(*curves[1:])
    points = {step: [curve[step] for curve in curves] for step in sorted(common)}
    return {step: (sum(values) / len(values), min(values), max(values)) for step, values in points.items()}


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes comparison.md, comparison.png and comparison.html to ``folder``; returns their paths."""
    paths = [folder / "comparison.md", folder / "comparison.png", folder / "comparison.html"]
    folder.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(f"# {comparison.title}\n\n{markdown(comparison)}", encoding="utf-8")
    paths[1].write_bytes(figure(comparison))
    paths[2].write_text(comparison_page(comparison, folder), encoding="utf-8")
    return paths
