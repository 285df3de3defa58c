"""The timeline of a run's page: how long each phase of each step took, one after the other."""

from __future__ import annotations

import math
from typing import Any

from rltrain.analysis.curves import Curves, Line
from rltrain.analysis.pages.charts import TOTALS

EVALUATION = "evaluation"
LIMIT = 5000  # steps with times of their own on a page
_EVAL = "time/eval"
_ORDER = (
    "rollout",
    "reward",
    "judge",
    "annotate",
    "update",
    "wait",
    "sync",
)  # any other phase stands behind these


def timeline_data(curves: Curves) -> dict[str, Any] | None:
    """What the page's script draws; None where steps log no phases.

    phases: names in the order of a step, evaluations last; a phase that a step enters twice, as the engine's
    waking is part of "sync", is one sum. steps: numbers, of a long
    run the last LIMIT. seconds: (N, P) wall-clock of each; an evaluation belongs to the step that it follows.
    total: seconds of each phase over the whole run, P. Times between steps, of a checkpoint, are in none.
    """
    names = sorted(
        dict.fromkeys(name for line in curves.steps for name in line if _is_phase(name)), key=_place
    )
    if len(names) < 2:
        return None
    lines = sorted(curves.steps, key=_step_of)
    evaluations = {_step_of(line): _seconds(line, _EVAL) for line in curves.evals}
    start = [] if not lines or 0 not in evaluations else [0]
    rows = {step: [0.0] * len(names) for step in start}
    rows |= {_step_of(line): [_seconds(line, name) for name in names] for line in lines}
    phases = [name.partition("/")[2] for name in names]
    if any(evaluations.values()):
        phases.append(EVALUATION)
        rows = {step: [*row, evaluations.get(step, 0.0)] for step, row in rows.items()}
    steps = list(rows)[-LIMIT:]
    return {
        "phases": phases,
        "steps": steps,
        "seconds": [[round(value, 4) for value in rows[step]] for step in steps],
        "total": [round(sum(row[place] for row in rows.values()), 3) for place in range(len(phases))],
        "leftOut": len(rows) - len(steps),
    }


def _is_phase(name: str) -> bool:
    return name.startswith("time/") and name not in TOTALS and not name.endswith("_per_second")


def _place(name: str) -> int:
    phase = name.partition("/")[2]
    return _ORDER.index(phase) if phase in _ORDER else len(_ORDER)


def _step_of(line: Line) -> int:
    return int(line["step"])


def _seconds(line: Line, name: str) -> float:
    value = line.get(name, 0.0)
    return value if math.isfinite(value) else 0.0
