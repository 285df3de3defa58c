"""When workers, learner and pushes were busy: ``timeline.jsonl`` in the run folder.

One JSON object a line: ``lane`` ("learner", "pushes", or a worker's name), ``kind`` (below), ``start`` and
``stop`` in seconds since 1970, and what else there is to say. What happens at a moment has ``stop`` equal to
``start``. Lines come in the order in which they ended; a run that was continued has two lines for what it did
again.

    learner  wait     for the rollouts of ``step``
             learn    from them, up to the push
             push     of ``version``, as the learner sees it
    pushes   push     of ``version`` to ``workers``, their names
    worker   sample   ``requests`` that it answered, ``tokens`` that it wrote, without a pause
             attached, lost, quarantined: its state from now on, with a ``reason``
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltrain.json_text import parse_json

__all__ = ["Interval", "Timeline", "read_timeline"]


@dataclass(frozen=True)
class Timeline:
    """Appends to a file, which several processes may do at once; None: nowhere."""

    path: Path | None

    def add(self, lane: str, kind: str, start: float, stop: float | None = None, **facts: Any) -> None:
        """stop: now, if not given."""
        if self.path is None:
            return
        stop = time.time() if stop is None else stop
        line = {"lane": lane, "kind": kind, "start": round(start, 4), "stop": round(stop, 4), **facts}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Interval:
    """A line of the file; start and stop in seconds since the file's earliest start."""

    lane: str
    kind: str
    start: float
    stop: float
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_timeline(path: Path) -> list[Interval]:
    """The intervals, by start; empty where there is no file. The last line may be incomplete."""
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    del rest  # empty, or of a write that was cut off
    records = [parse_json(line) for line in lines]
    first = min((record["start"] for record in records), default=0.0)
    intervals = [
        Interval(
            record.pop("lane"),
            record.pop("kind"),
            record.pop("start") - first,
            record.pop("stop") - first,
            record,
        )
        for record in records
    ]
    return sorted(intervals, key=lambda interval: (interval.start, interval.stop))
