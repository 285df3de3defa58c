"""Compares methods by their runs' curves: a table for each kind of run, as Markdown, and one figure."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.analysis.curves import (
    ANY,
    Curves,
    Range,
    Spread,
    mean_over_runs,
    moving_mean,
    range_of,
    student_mean,
)
from rltrain.report.law import fit_law

LAW = "law"  # the panel of reward against entropy
_PANELS_PER_ROW = 5  # panels in a row of the figure
_HEADLINE = ("eval/pass@1", "eval/accuracy")  # methods are judged by the first of these that the runs have
_PREFERENCE_MEASURES = (
    "eval/margin",
    "eval/entropy",
    "eval/sampled_entropy",
    "eval/sampled_tokens",
    "eval/brier",
    "eval/ece",
)
_PASSES = (
    ("loss/accuracy", "accuracy in the last pass"),
    ("loss/preference", "held-out loss less the last pass's"),
)


@dataclass(frozen=True)
class Comparison:
    """Runs by method, with seeds in the same order for every method; the other methods are compared with
    the first.
    """

    title: str
    conditions: tuple[str, ...]  # one line each, for the reader
    methods: Mapping[str, Sequence[Curves]]

    @property
    def parts(self) -> list[Comparison]:
        """Methods on sampled completions and methods on judged ones, apart: they share hardly a measure."""
        kinds: dict[bool, dict[str, Sequence[Curves]]] = {}
        for name, runs in self.methods.items():
            kinds.setdefault(any(run.samples for run in runs), {})[name] = runs
        if len(kinds) == 1:
            return [self]
        titles = {True: "trained on sampled completions", False: "trained on judged completions"}
        return [Comparison(titles[kind], (), kinds[kind]) for kind in (True, False)]

    @property
    def measures(self) -> list[str]:
        """Held-out metrics that some run has: the headline, the pass@k of the largest k, and the measures
        of learnt preferences.
        """
        names: set[str] = set()
        for runs in self.methods.values():
            for run in runs:
                names.update(*run.evals)
        pass_at_k = sorted(
            (name for name in names if name.startswith("eval/pass@") and "_" not in name),
            key=lambda name: int(name[10:]),
        )
        headline = [name for name in _HEADLINE if name in names]
        preferences = [name for name in _PREFERENCE_MEASURES if name in names]
        return list(dict.fromkeys([*headline[:1], *pass_at_k[-1:], *preferences]))

    @property
    def passes(self) -> dict[str, str]:
        """Columns, by metric, that compare training and held-out examples of runs on judged completions."""
        all_runs = [run for runs in self.methods.values() for run in runs]
        return {
            metric: column
            for metric, column in _PASSES
            if any(run.last_pass(metric) is not None for run in all_runs)
        }


def table(comparison: Comparison) -> list[list[str]]:
    """Header and one row per method.

    Intervals over seeds are Student's; differences are paired by seed.
    """
    measures = comparison.measures
    header = ["method", "seeds"]
    for measure in measures:
        short = measure.partition("/")[2]
        header.append(f"{short} at the end")
        if _more_is_better(measure):
            header.append(f"{short} at its best")

    first = next(iter(comparison.methods))
    others = measures if len(comparison.methods) > 1 else []
    header += [f"{measure.partition('/')[2]} less {first}'s" for measure in others]
    header += [
        "entropy at the end / start",
        *([f"that less {first}'s"] if others else []),
        "law's ceiling",
        "tokens touched",
        "minutes",
    ]
    header[-1:-1] = comparison.passes.values()
    return [header, *(_row(name, runs, comparison, others) for name, runs in comparison.methods.items())]


def _more_is_better(measure: str) -> bool:
    return measure in _HEADLINE or measure.startswith("eval/pass@")


def _row(name: str, runs: Sequence[Curves], comparison: Comparison, others: Sequence[str]) -> list[str]:
    """others: the measures whose difference from the first method is shown."""
    reference = next(iter(comparison.methods.values()))
    cells = [name, str(len(runs))]
    for measure in comparison.measures:
        within = range_of(measure)
        cells.append(_format_spread(mean_over_runs(runs, lambda run, m=measure: run.final(m), within)))
        if _more_is_better(measure):
            cells.append(_format_spread(mean_over_runs(runs, lambda run, m=measure: run.best(m), within)))
    for measure in others:
        difference = None if runs is reference else paired_seeds(runs, reference, measure)
        cells.append(_format_spread(difference))

    kept = [run.entropy_kept for run in runs]
    cells.append(_format_spread(student_mean(kept, (0.0, math.inf))))
    if others:
        cells.append(_format_spread(None if runs is reference else entropy_difference(runs, reference)))

    shares = {
        control: student_mean([run.touched_shares().get(control, 0.0) for run in runs]).value
        for control in sorted(set().union(*map(Curves.touched_shares, runs)))
    }
    touched = ", ".join(f"{control} {share:.2%}" for control, share in shares.items())
    cells += [
        _format_spread(mean_over_runs(runs, Curves.ceiling)),
        touched or "-",
        *(_format_spread(_last_pass_spread(runs, metric)) for metric in comparison.passes),
    ]
    return [*cells, f"{sum(run.minutes for run in runs):.1f}"]


def paired_seeds(runs: Sequence[Curves], reference: Sequence[Curves], measure: str) -> Spread | None:
    """Mean over seeds of the final difference from ``reference``; None unless all runs have ``measure``
    and both methods have the same number of runs.
    """
    finals = [[run.final(measure) for run in method_runs] for method_runs in (runs, reference)]
    values = [[spread.value for spread in method_runs if spread is not None] for method_runs in finals]
    low, high = range_of(measure)
    within = (low - high, high - low)
    return _differences(values[0], values[1], within) if len(values[0]) == len(runs) else None


def entropy_difference(runs: Sequence[Curves], reference: Sequence[Curves]) -> Spread | None:
    """The same of the share of entropy that is kept."""
    return _differences([run.entropy_kept for run in runs], [run.entropy_kept for run in reference])


def _differences(values: Sequence[float], reference: Sequence[float], within: Range = ANY) -> Spread | None:
    if len(values) != len(reference):
        return None
    return student_mean([value - base for value, base in zip(values, reference, strict=True)], within)


def _last_pass_spread(runs: Sequence[Curves], metric: str) -> Spread | None:
    """``metric`` in the last pass over the training examples, over all runs; for the loss, how much higher
    the final loss is on held-out examples.
    """
    values = [value for run in runs if (value := run.last_pass(metric)) is not None]
    if metric != "loss/preference":
        return student_mean(values) if len(values) == len(runs) else None
    held_out = [spread.value for run in runs if (spread := run.final("eval/loss")) is not None]
    return _differences(held_out, values) if held_out else None


def _format_spread(spread: Spread | None) -> str:
    return "-" if spread is None or math.isnan(spread.value) else str(spread)


def markdown(comparison: Comparison) -> str:
    """A table for each kind of run, then the conditions and what a reader must know of the numbers."""
    parts = comparison.parts
    tables = []
    for part in parts:
        header, *rows = table(part)
        lines = [header, ["---"] * len(header), *rows]
        heading = f"{part.title}\n\n" if len(parts) > 1 else ""
        tables.append(heading + "".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    notes = "".join(f"- {line}\n" for line in (*comparison.conditions, *reading_notes(comparison)))
    return "\n".join(tables) + (f"\n{notes}" if notes else "")


def reading_notes(comparison: Comparison) -> list[str]:
    """Ceilings that no reward can reach, and methods whose curves hide one another."""
    notes: list[str] = []
    for name, runs in comparison.methods.items():
        ceiling = mean_over_runs(runs, Curves.ceiling)
        if ceiling is not None and ceiling.value > 1 and any(run.has_share_rewards for run in runs):
            notes.append(
                f"the law's ceiling of {name} is {ceiling.value:.3f}, and no share is above 1: the line "
                "through the steps does not go on to zero entropy"
            )
    for part in comparison.parts:
        for first, second in itertools.combinations(part.methods, 2):
            equal = _equal_panels(part, first, second)
            if equal:
                notes.append(
                    f"{first} and {second} are equal at every step in {', '.join(equal)}: one curve is drawn "
                    "over the other"
                )
    return notes


def _equal_panels(comparison: Comparison, first: str, second: str) -> list[str]:
    """Titles of the panels in which two methods' runs have the same values."""
    pairs = [comparison.methods[name] for name in (first, second)]
    titles = []
    for metric, title in list_panels(comparison):
        first_series, second_series = ([run.series(metric) for run in runs] for runs in pairs)
        if metric != LAW and first_series == second_series and any(steps for steps, _ in first_series):
            titles.append(title)
    return titles


def figure(comparison: Comparison) -> bytes:
    """PNG of training reward, entropy and held-out metrics over steps, and of reward against entropy with
    the law's fit. Every second method is dashed, so that a curve under an equal one shows.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list_panels(comparison)
    rows = math.ceil(len(panels) / _PANELS_PER_ROW)
    columns = math.ceil(len(panels) / rows)
    canvas, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    axes = grid.flatten()[: len(panels)]
    for unused in grid.flatten()[len(panels) :]:
        unused.remove()

    palette = plt.get_cmap("tab10" if len(comparison.methods) <= 10 else "tab20")
    for number, (name, runs) in enumerate(comparison.methods.items()):
        colour = palette(number % palette.N)
        for axis, (metric, _) in zip(axes, panels, strict=True):
            if metric == LAW:
                draw_law(axis, runs, colour)
                continue
            width = 1 if metric.startswith("eval/") else 9
            for seed, run in enumerate(runs):
                steps, values = run.series(metric)
                axis.plot(
                    steps,
                    moving_mean(values, width),
                    color=colour,
                    alpha=0.8,
                    linewidth=1.1,
                    linestyle="--" if number % 2 else "-",
                    label=name if seed == 0 else None,
                )

    for axis, (metric, title) in zip(axes, panels, strict=True):
        axis.set(title=title, xlabel="step" if metric != LAW else "policy entropy, nats")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)

    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110)
    plt.close(canvas)
    return buffer.getvalue()


def list_panels(comparison: Comparison) -> list[tuple[str, str]]:
    """(metric, title) of every panel whose metric some run logged."""
    all_runs = [run for runs in comparison.methods.values() for run in runs]
    panels = [
        ("reward/mean", "training reward"),
        ("learner/entropy_mean", "policy entropy, nats"),
        ("loss/accuracy", "training accuracy"),
    ]
    panels += [(measure, f"held-out {measure.partition('/')[2]}") for measure in comparison.measures]
    logged = [panel for panel in panels if any(run.series(panel[0])[0] for run in all_runs)]
    if {"reward/mean", "learner/entropy_mean"} <= {metric for metric, _ in logged}:
        return [*logged, (LAW, "reward against entropy, with R = -a exp(H) + b")]
    return [("loss/total", "training loss"), *logged]


def draw_law(axis: Any, runs: Sequence[Curves], colour: Any) -> None:
    """Draws points and fit of the first run of a method, if it logged entropy and reward."""
    points = runs[0].law_points()
    if len(points) < 3:
        return
    entropies, rewards = zip(*points, strict=True)
    axis.plot(entropies, rewards, ".", color=colour, markersize=2, alpha=0.4)
    law = fit_law(entropies, rewards)
    if law is not None:
        low = min(entropies)
        high = max(entropies)
        grid = [low + (high - low) * place / 50 for place in range(51)]
        axis.plot(grid, [law.reward_at(entropy) for entropy in grid], color=colour, linewidth=1.2)
