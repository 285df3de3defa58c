"""Who was busy when: the lanes of a run's page, from its ``timeline.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rltrain.timeline import Interval, read_timeline

LIMIT = 8000  # intervals on a page
_FIRST = ("learner", "pushes")  # above the workers
_MOMENT = 1e-4  # seconds; what is shorter is a mark


def lanes_data(path: Path) -> dict[str, Any] | None:
    """What the page's script draws; None where the run has no timeline.

    lanes: names, the learner and the pushes first. kinds: names of what happened. bars: (lane, kind, start,
    stop, facts in words), seconds since the run's first event, by start; of a long run the last LIMIT.
    """
    intervals = read_timeline(path)
    if not intervals:
        return None
    shown = intervals[-LIMIT:]
    present = dict.fromkeys(interval.lane for interval in shown)
    lanes = [*(lane for lane in _FIRST if lane in present), *sorted(set(present) - set(_FIRST))]
    kinds = sorted({interval.kind for interval in shown})
    return {
        "lanes": lanes,
        "kinds": kinds,
        "bars": [
            [
                lanes.index(interval.lane),
                kinds.index(interval.kind),
                round(interval.start, 4),
                round(interval.stop, 4),
                describe_facts(interval),
            ]
            for interval in shown
        ],
        "leftOut": len(intervals) - len(shown),
    }


def describe_facts(interval: Interval) -> str:
    """Its length and what the file says of it besides."""
    length = interval.stop - interval.start
    words = [] if length < _MOMENT else [f"{length:.3g} s"]
    for name, value in interval.facts.items():
        plain = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"{name} {plain}")
    return "; ".join(words)
