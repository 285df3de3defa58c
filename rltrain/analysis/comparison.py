"""Methods side by side: one table, as Markdown and in a page, and one figure, from the curves of
their runs.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rltrain.analysis.curves import Curves, Spread, over_seeds, student
from rltrain.report.law import fit_law

_LAW = "law"  # the panel of reward against entropy
_ABREAST = 5  # panels in a row of the figure
_HEADLINE = ("eval/pass@1", "eval/accuracy")  # what methods are judged by: the first that the runs have
_OF_PREFERENCES = (
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
    """Runs by method, seeds of one method in the same order throughout; the first method is what the
    others are held against.
    """

    title: str
    conditions: tuple[str, ...]  # one line each, for the reader
    methods: Mapping[str, Sequence[Curves]]

    @property
    def measures(self) -> list[str]:
        """Held-out metrics that some run has: the headline, the widest pass@k, and what else is
        measured of learnt preferences.
        """
        names = {
            name for runs in self.methods.values() for run in runs for line in run.evals for name in line
        }
        widest = sorted(
            (name for name in names if name.startswith("eval/pass@") and "_" not in name),
            key=lambda name: int(name[10:]),
        )
        headline = [name for name in _HEADLINE if name in names]
        return list(
            dict.fromkeys([*headline[:1], *widest[-1:], *(name for name in _OF_PREFERENCES if name in names)])
        )

    @property
    def passes(self) -> dict[str, str]:
        """Columns, by metric, of what tells training from held-out examples where runs go over judged
        ones.
        """
        every = [run for runs in self.methods.values() for run in runs]
        return {
            metric: column
            for metric, column in _PASSES
            if any(run.last_pass(metric) is not None for run in every)
        }


def table(comparison: Comparison) -> list[list[str]]:
    """Header and one row per method.

    Intervals over seeds are Student's; the differences are paired by seed.
    """
    measures = comparison.measures
    header = ["method", "seeds"]
    for measure in measures:
        short = measure.partition("/")[2]
        header += [f"{short} at the end", *([f"{short} at its best"] if _more_is_better(measure) else [])]
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
    """others: measures of which the difference to the first method is shown."""
    reference = next(iter(comparison.methods.values()))
    cells = [name, str(len(runs))]
    for measure in comparison.measures:
        cells.append(_shown(over_seeds(runs, lambda run, m=measure: run.final(m))))
        if _more_is_better(measure):
            cells.append(_shown(over_seeds(runs, lambda run, m=measure: run.best(m))))
    cells += [
        _shown(None if runs is reference else paired_seeds(runs, reference, measure)) for measure in others
    ]
    shares = {
        control: student([run.touched().get(control, 0.0) for run in runs]).value
        for control in sorted(set().union(*map(Curves.touched, runs)))
    }
    touched = ", ".join(f"{control} {share:.2%}" for control, share in shares.items())
    cells.append(_shown(student([run.entropy_kept for run in runs])))
    if others:
        cells.append(
            _shown(
                None
                if runs is reference
                else _differences([run.entropy_kept for run in runs], [run.entropy_kept for run in reference])
            )
        )
    cells += [
        _shown(over_seeds(runs, Curves.ceiling)),
        touched or "-",
        *(_shown(_of_last_pass(runs, metric)) for metric in comparison.passes),
    ]
    return [*cells, f"{sum(run.minutes for run in runs):.1f}"]


def paired_seeds(runs: Sequence[Curves], reference: Sequence[Curves], measure: str) -> Spread | None:
    """Mean over seeds of the final difference to ``reference``; None unless both have the same number
    of runs with it.
    """
    finals = [[run.final(measure) for run in some] for some in (runs, reference)]
    values = [[one.value for one in some if one is not None] for some in finals]
    return _differences(*values) if len(values[0]) == len(runs) else None


def _differences(values: Sequence[float], reference: Sequence[float]) -> Spread | None:
    if len(values) != len(reference):
        return None
    return student([one - other for one, other in zip(values, reference, strict=True)])


def _of_last_pass(runs: Sequence[Curves], metric: str) -> Spread | None:
    """Over the runs, ``metric`` in the last pass over the training examples; of the loss, how much
    higher it ends on held-out ones.
    """
    seen = [value for run in runs if (value := run.last_pass(metric)) is not None]
    if metric != "loss/preference":
        return student(seen) if len(seen) == len(runs) else None
    held_out = [one.value for run in runs if (one := run.final("eval/loss")) is not None]
    return _differences(held_out, seen) if held_out else None


def _shown(spread: Spread | None) -> str:
    return "-" if spread is None or math.isnan(spread.value) else str(spread)


def markdown(comparison: Comparison) -> str:
    header, *rows = table(comparison)
    lines = [header, ["---"] * len(header), *rows]
    notes = "".join(f"- {line}\n" for line in comparison.conditions)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n" + (f"\n{notes}" if notes else "")


def figure(comparison: Comparison) -> bytes:
    """PNG: training reward, entropy and held-out metrics over steps, and reward against entropy with
    the law's fit.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(comparison)
    rows = math.ceil(len(panels) / _ABREAST)
    columns = math.ceil(len(panels) / rows)
    drawn, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    axes = grid.flatten()[: len(panels)]
    for unused in grid.flatten()[len(panels) :]:
        unused.remove()
    palette = plt.get_cmap("tab10" if len(comparison.methods) <= 10 else "tab20")
    for number, (name, runs) in enumerate(comparison.methods.items()):
        colour = palette(number % palette.N)
        for axis, (metric, _) in zip(axes, panels, strict=True):
            if metric == _LAW:
                draw_law(axis, runs, colour)
                continue
            for seed, run in enumerate(runs):
                smoothed = partial(moving_metrics, width=1 if metric.startswith("eval/") else 9)
                steps, values = run.series(metric)
                axis.plot(
                    steps,
                    smoothed(values),
                    color=colour,
                    alpha=0.8,
                    linewidth=1.1,
                    label=name if seed == 0 else None,
                )
    for axis, (metric, title) in zip(axes, panels, strict=True):
        axis.set(title=title, xlabel="step" if metric != _LAW else "policy entropy, nats")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    plt.close(drawn)
    return buffer.getvalue()


def _panels(comparison: Comparison) -> list[tuple[str, str]]:
    """(metric, title) of what the runs logged."""
    every = [run for runs in comparison.methods.values() for run in runs]
    panels = [
        ("reward/mean", "training reward"),
        ("learner/entropy_mean", "policy entropy, nats"),
        ("loss/accuracy", "training accuracy"),
    ]
    panels += [(measure, f"held-out {measure.partition('/')[2]}") for measure in comparison.measures]
    found = [panel for panel in panels if any(run.series(panel[0])[0] for run in every)]
    if {"reward/mean", "learner/entropy_mean"} <= {metric for metric, _ in found}:
        return [*found, (_LAW, "reward against entropy, with R = -a exp(H) + b")]
    return [("loss/total", "training loss"), *found]


def draw_law(axis: Any, runs: Sequence[Curves], colour: Any) -> None:
    """Points and fit of the first run of a method; nothing where it logged neither."""
    entropies, rewards = runs[0].series("learner/entropy_mean")[1], runs[0].series("reward/mean")[1]
    if len(entropies) < 3 or len(entropies) != len(rewards):
        return
    axis.plot(entropies, rewards, ".", color=colour, markersize=2, alpha=0.4)
    law = fit_law(entropies, rewards)
    if law is not None:
        low, high = min(entropies), max(entropies)
        grid = [low + (high - low) * place / 50 for place in range(51)]
        axis.plot(grid, [law.at(entropy) for entropy in grid], color=colour, linewidth=1.2)


def moving_metrics(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last ``width`` values."""
    return [sum(values[max(0, at - width + 1) : at + 1]) / min(at + 1, width) for at in range(len(values))]


def page(comparison: Comparison, png: bytes) -> str:
    """One HTML file with everything in it: opens anywhere, loads nothing."""
    header, *rows = table(comparison)

    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = [
        f"<h1>{html.escape(comparison.title)}</h1>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in comparison.conditions) + "</ul>",
        "<table><thead>"
        + cells("th", header)
        + "</thead><tbody>"
        + "".join(cells("td", row) for row in rows)
        + "</tbody></table>",
        f'<img alt="curves of every run" src="data:image/png;base64,{base64.b64encode(png).decode()}">',
    ]
    style = (
        "body{font:15px/1.5 "
        "system-ui,sans-serif;margin:2rem;max-width:120rem}table{border-collapse:collapse}img{max-width:100%}"
        "th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}thead{background:#f3f3f3}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(comparison.title)}</title><style>{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """comparison.md, comparison.png and comparison.html in ``folder``."""
    png = figure(comparison)
    made = [folder / "comparison.md", folder / "comparison.png", folder / "comparison.html"]
    folder.mkdir(parents=True, exist_ok=True)
    made[0].write_text(f"# {comparison.title}\n\n{markdown(comparison)}", encoding="utf-8")
    made[1].write_bytes(png)
    made[2].write_text(page(comparison, png), encoding="utf-8")
    return made


def run_page(title: str, curves: Curves) -> str:
    """The page of one run: what it measured at its end and at its best, and its curves."""
    alone = Comparison(title, (f"{len(curves.steps)} steps",), {title: [curves]})
    return page(alone, figure(alone))
