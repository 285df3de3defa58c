"""report.html: one run, with its facts, changes, costs, curves and completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rltrain.analysis.curves import Curves
from rltrain.analysis.pages.charts import POINTS, chart_data, law_data, run_charts, smoothing_width
from rltrain.analysis.pages.completions import CompletionSet, read_completions
from rltrain.analysis.pages.lanes import lanes_data
from rltrain.analysis.pages.render import render_page
from rltrain.analysis.pages.replay import replay_notes
from rltrain.analysis.pages.summary import list_changes, list_costs, read_facts
from rltrain.analysis.pages.timeline import timeline_data
from rltrain.checkpoint.run_folder import RunFolder, write_atomic


def run_page(folder: RunFolder) -> str:
    """The page of the run in ``folder``, finished or not. Raises UserError if it has no training step."""
    curves = Curves.read(folder.path)
    facts = read_facts(folder)
    completions = read_completions(folder.transcripts)
    return render_page(
        "run.html.j2",
        title=facts.title,
        name=folder.path.name,
        facts=facts,
        changes=list_changes(curves),
        costs=list_costs(curves),
        notes=[*replay_notes(folder), *page_notes(curves, completions)],
        smoothing=smoothing_width(len(curves.steps)),
        completions=completions,
        data=page_data(curves, completions, folder),
    )


def page_data(curves: Curves, completions: CompletionSet, folder: RunFolder) -> dict[str, Any]:
    """What the page's scripts read."""
    charts, others = run_charts(curves)
    return {
        "charts": [chart_data(chart, curves) for chart in charts],
        "others": [chart_data(chart, curves) for chart in others],
        "law": law_data(curves),
        "timeline": timeline_data(curves),
        "lanes": lanes_data(folder.timeline),
        "groups": list(completions.groups),
    }


def page_notes(curves: Curves, completions: CompletionSet) -> list[str]:
    """What a reader must know of the numbers: what was left out, and what was not finite."""
    notes = []
    if len(curves.steps) > POINTS:
        notes.append(
            f"Curves of {len(curves.steps)} steps are thinned to about {POINTS} points for drawing: of "
            "neighbouring steps the smallest and the largest value stay."
        )
    if len(completions.groups) < completions.total:
        notes.append(
            f"Completions: {len(completions.groups)} of the {completions.total} prompts in "
            f"transcripts.jsonl, from {completions.steps_shown} evenly spaced steps of "
            f"{completions.steps_total}."
        )
    notes += [
        f"{name} was not finite {count} {'time' if count == 1 else 'times'}; metrics.jsonl says where."
        for name, count in sorted(curves.nonfinite.items())
    ]
    return notes


def write_missing_report(path: Path) -> Path | None:
    """Writes report.html of the run in ``path``; None, and nothing, if it has one."""
    folder = RunFolder.from_path(path)
    if folder.report.exists():
        return None
    write_atomic(folder.report, run_page(folder))
    return folder.report
