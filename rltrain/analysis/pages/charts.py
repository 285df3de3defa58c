"""The curves of a run's page: which metrics share a chart, and their points, thinned for drawing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rltrain.analysis.curves import Curves, moving_mean
from rltrain.report.law import fit_law
from rltrain.report.names import metric

POINTS = 1000  # points of a curve on a page; a longer curve is thinned
_SMOOTHED_SHARE = 50  # the smoothed curve averages over this part of the steps
TOTALS = ("time/step", "time/elapsed", "time/eval")  # times that are not a phase of a step


@dataclass(frozen=True)
class Line:
    """One curve of a chart. low, high: metrics that bound its band."""

    metric: str
    label: str
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    about: str
    lines: tuple[Line, ...]
    log: bool = False  # a logarithmic y axis


def run_charts(curves: Curves) -> tuple[list[Chart], list[Chart]]:
    """The charts that matter, in the order of a reader's questions, and one chart for each other metric."""
    logged = set().union(*curves.steps, *curves.evals) - {"step"}
    names = [name for name in sorted(logged, key=_natural_order) if curves.series(name)[0]]
    charts = [chart for chart in _main_charts(names) if chart.lines]
    shown = {name for chart in charts for line in chart.lines for name in (line.metric, line.low, line.high)}
    others = [_single_chart(name) for name in names if name not in shown and not _is_bound(name, names)]
    return charts, others


# (title, unit, what is drawn, patterns of its metrics, whether its axis is logarithmic)
_CHARTS = (
    (
        "Reward",
        "reward",
        "mean over graded completions",
        ("reward/mean", "reward/correct", "eval/reward"),
        False,
    ),
    ("Held-out pass@k", "share", "band: 95 % bootstrap interval", ("eval/pass@*", "eval/avg@*"), False),
    ("Held-out accuracy", "share", "band: 95 % bootstrap interval", ("eval/accuracy",), False),
    (
        "Entropy",
        "nats",
        "of the policy at its tokens; band: 10th to 90th percentile, held out: 95 % interval",
        ("learner/entropy_mean", "eval/entropy", "eval/sampled_entropy"),
        False,
    ),
    ("Covariance", "nats", "of log-prob and advantage", ("advantage/logp_covariance",), False),
    (
        "Touched tokens",
        "share",
        "changed by a control, clipped by the loss, or masked",
        ("*_touched", "loss/clip_low", "loss/clip_high", "control/masked"),
        False,
    ),
    ("Engine and learner", "nats", "difference of log-probs", ("rollout/mismatch_*",), True),
    (
        "Lengths",
        "tokens",
        "of completions",
        ("rollout/length_*", "eval/tokens", "eval/sampled_tokens"),
        False,
    ),
    ("Loss", "loss", "not comparable between methods", ("loss/total", "eval/loss"), False),
    ("Training accuracy", "share", "before the step that learns the pair", ("loss/accuracy",), False),
    ("Margin", "reward", "of the better over the worse completion", ("loss/margin", "eval/margin"), False),
    ("KL", "nats", "as the loss reports it", ("loss/kl", "loss/approx_kl"), False),
    ("Gradient norm", "", "before clipping", ("learner/grad_norm",), False),
    (
        "Groups and completions",
        "share",
        "groups whose rewards differ; completions graded, cut, aborted",
        ("reward/useful_groups", "reward/graded", "rollout/finished_by_length", "rollout/aborted"),
        False,
    ),
    ("Phases of a step", "s", "wall-clock time", ("time/*",), False),
    ("Throughput", "per second", "of the whole step", ("time/*_per_second",), False),
    ("Memory", "GiB", "of rank 0's process and GPU; peaks since the start", ("memory/*",), False),
)


def _main_charts(names: Sequence[str]) -> list[Chart]:
    charts = []
    for title, unit, about, patterns, log in _CHARTS:
        chosen = [name for pattern in patterns for name in names if fnmatchcase(name, pattern)]
        if title == "Phases of a step":
            chosen = [name for name in chosen if name not in TOTALS and not name.endswith("_per_second")]
        lines = tuple(_line(name, names) for name in chosen if not _is_bound(name, names))
        charts.append(Chart(title, unit, about, lines, log))
    return charts


_LABELS = {
    "learner/entropy_mean": "mean",
    "loss/clip_low": "clipped below",
    "loss/clip_high": "clipped above",
    "eval/reward": "held-out reward",
    "eval/tokens": "held-out length",
}


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts pass@8 before pass@16."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _line(name: str, names: Sequence[str]) -> Line:
    label = _LABELS.get(name, name.partition("/")[2].removesuffix("_touched").replace("_", " "))
    if name.startswith("eval/") and not label.startswith(("held-out", "pass@", "avg@")):
        label = f"held-out {label}"
    low = f"{name}_low"
    high = f"{name}_high"
    if name == "learner/entropy_mean":
        low = "learner/entropy_p10"
        high = "learner/entropy_p90"
    return Line(name, label, low, high) if {low, high} <= set(names) else Line(name, label)


def _single_chart(name: str) -> Chart:
    row = metric(name)
    return Chart(name, row.unit, row.what, (Line(name, name.partition("/")[2]),))


def _is_bound(name: str, names: Sequence[str]) -> bool:
    """Whether ``name`` is a bound of another metric's interval."""
    return any(name.endswith(end) and name.removesuffix(end) in names for end in ("_low", "_high"))


def chart_data(chart: Chart, curves: Curves) -> dict[str, Any]:
    """What the page's script draws. x: (N,) steps; every curve has N values, null where it has none."""
    columns = {
        name: dict(zip(*curves.series(name), strict=True))
        for line in chart.lines
        for name in (line.metric, line.low, line.high)
        if name is not None
    }
    lines = _distinct_lines(chart.lines, columns)
    steps = sorted(set().union(*columns.values()))
    chosen = thin_steps(steps, [columns[line.metric] for line in lines])

    def values(name: str | None) -> list[float | None] | None:
        return None if name is None else [round_value(columns[name].get(step)) for step in chosen]

    def is_held_out(line: Line) -> bool:
        return line.metric.startswith("eval/")

    width = smoothing_width(len(curves.steps))
    return {
        "title": chart.title,
        "unit": chart.unit,
        "about": chart.about,
        "log": chart.log and all(value > 0 for line in lines for value in columns[line.metric].values()),
        "x": chosen,
        "lines": [
            {
                "label": line.label,
                "metric": line.metric,
                "values": values(line.metric),
                "low": values(line.low),
                "high": values(line.high),
                "smooth": None if is_held_out(line) else _smooth(columns[line.metric], chosen, width),
                "sparse": is_held_out(line),
            }
            for line in lines
        ],
    }


def _distinct_lines(lines: Sequence[Line], columns: Mapping[str, dict[int, float]]) -> list[Line]:
    """Curves that are equal everywhere, such as the mean reward and the share right, become one."""
    distinct: list[Line] = []
    for line in lines:
        column = _round_values(columns[line.metric])
        twin = next((other for other in distinct if _round_values(columns[other.metric]) == column), None)
        if twin is None:
            distinct.append(line)
        else:
            label = f"{twin.label}, {line.label}"
            distinct[distinct.index(twin)] = Line(
                twin.metric, label, twin.low or line.low, twin.high or line.high
            )
    return distinct


def _round_values(column: Mapping[int, float]) -> dict[int, float | None]:
    return {step: round_value(value) for step, value in column.items()}


def smoothing_width(steps: int, share: int = _SMOOTHED_SHARE) -> int:
    """Steps that the smoothed curve averages over, one in ``share`` of all; 1: it is not smoothed."""
    return max(1, round(steps / share))


def _smooth(column: dict[int, float], chosen: Sequence[int], width: int) -> list[float | None] | None:
    """Mean over the last ``width`` values of all steps, thinned or not; None for a curve with few values."""
    if width < 2 or len(column) < 2 * width:
        return None
    means = dict(zip(column, moving_mean(list(column.values()), width), strict=True))
    return [round_value(means.get(step)) for step in chosen]


def thin_steps(steps: Sequence[int], columns: Sequence[dict[int, float]], points: int = POINTS) -> list[int]:
    """At most about ``points`` of ``steps``: of every stretch of neighbouring steps, those at which a curve
    is smallest or largest, so that no peak is lost; besides the first and the last step, and every step of a
    curve of few points.
    """
    if len(steps) <= points:
        return list(steps)
    share = points // (2 * len(columns))
    dense = [column for column in columns if len(column) > share]
    size = math.ceil(len(steps) / share)
    chosen = {steps[0], steps[-1]}.union(*(column for column in columns if len(column) <= share))
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        for column in dense:
            logged = [step for step in part if step in column]
            if logged:
                chosen |= {min(logged, key=column.__getitem__), max(logged, key=column.__getitem__)}
    return sorted(chosen)


def law_data(curves: Curves) -> dict[str, Any] | None:
    """Points and fit of R = -a exp(H) + b, in the order of entropy; None if it was not fitted."""
    points = curves.law_points()
    law = fit_law(*zip(*points, strict=True)) if len(points) > 2 else None
    if law is None:
        return None
    stride = math.ceil(len(points) / POINTS)
    order = sorted(range(0, len(points), stride), key=lambda place: points[place][0])
    return {
        "entropy": [round_value(points[place][0]) for place in order],
        "reward": [round_value(points[place][1]) for place in order],
        "fit": [round_value(law.reward_at(points[place][0])) for place in order],
        "text": f"R = -{law.a.value:.3g} exp(H) + {law.b.value:.3g}; at zero entropy "
        f"{law.ceiling.value:.3f} [{law.ceiling.low:.3f}, {law.ceiling.high:.3f}]"
        f"{law.limit_note() if curves.has_share_rewards else ''}; {law.points} steps"
        + (f", one in {stride} drawn" if stride > 1 else ""),
    }


def round_value(value: float | None) -> float | None:
    """Five significant digits, enough for a drawing."""
    return None if value is None else float(f"{value:.5g}")
