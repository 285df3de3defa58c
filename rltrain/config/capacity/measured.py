"""Rates that a run measured, and the seconds of a step that follow from them for other numbers of GPUs.

Work divides among workers, and among the learner's processes, without loss: samples that took w workers
s seconds take v workers s w / v. So the prediction is good for numbers near the measured ones: a worker that
has fewer rows at a time is hardly faster, and a learner of many ranks pays for what travels between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rltrain.config.capacity.overlap import StepCost
from rltrain.errors import UserError
from rltrain.timeline import Interval

__all__ = ["MeasuredStep", "StepNumbers", "measure_step"]

_ROUNDING = 1e-3  # s, of the times in a timeline


@dataclass(frozen=True)
class StepNumbers:
    """Of a step that a run took. learning: seconds before the push, without waits. tokens: of its samples."""

    learning: float
    tokens: float


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds and tokens of a step, on average over ``steps``. workers: that sampled. learners: processes."""

    sampling: float
    learning: float
    push: float
    tokens: float
    workers: int
    learners: int
    steps: range

    def predict(self, learners: int, workers: int, *, overlaps: bool, size: float = 1.0) -> StepCost:
        """A step with these numbers of learner processes and workers. size: its samples, in steps of the
        run.
        """
        return StepCost(
            size * self.sampling * self.workers / workers,
            size * self.learning * self.learners / learners,
            self.push,
            overlaps,
        )


def measure_step(
    intervals: Sequence[Interval],
    numbers: Mapping[int, StepNumbers],
    learners: int,
    *,
    ahead: int,
    runs_freely: bool,
    overlaps: bool,
) -> MeasuredStep:
    """intervals: of the run's timeline. numbers: by step. ahead: steps by which workers sample ahead.
    runs_freely: no worker waits for another. overlaps: they sample while the learner learns.

    Left out are the first step, in which things warm up, and at both ends those whose samples the run does
    not have all the while. Raises UserError where too little is left.
    """
    waits = {each.facts["step"]: each for each in intervals if (each.lane, each.kind) == ("learner", "wait")}
    learns = {
        each.facts["step"]: each for each in intervals if (each.lane, each.kind) == ("learner", "learn")
    }
    taken = sorted(waits.keys() & learns.keys() & numbers.keys())
    used = taken[1 + ahead : len(taken) - ahead]
    if not used:
        raise UserError(
            f"the run has {len(taken)} steps with times, and {2 + 2 * ahead} are needed to measure one: the "
            f"first, and {ahead} more at either end, are left out; measure a longer run"
        )
    windows = [(each[step].start, each[step].stop) for step in used for each in (waits, learns)]
    first = windows[0][0]
    last = windows[-1][1]
    pushes = [
        each.stop - each.start
        for each in intervals
        if (each.lane, each.kind) == ("learner", "push") and first <= each.start <= last + _ROUNDING
    ]
    lanes: dict[str, list[tuple[float, float]]] = {}
    for each in intervals:
        if each.kind == "sample" and each.start < last and each.stop > first:
            lanes.setdefault(each.lane, []).append((each.start, each.stop))
    if not lanes and overlaps:
        raise UserError(
            "the run's timeline has no worker, so nobody knows how long they sampled while the learner "
            "learned; measure a run with rollout.workers, or one with rollout.schedule sync"
        )
    spans = [_merge(spans) for spans in lanes.values()]
    if not runs_freely:
        spans = [_merge(span for lane in spans for span in lane)]
    if not lanes:
        spans = [[(waits[step].start, waits[step].stop) for step in used]]
    busy = fmean(_overlap(lane, windows) for lane in spans)
    return MeasuredStep(
        sampling=busy / len(used),
        learning=fmean(numbers[step].learning for step in used),
        push=fmean(pushes) if pushes else 0.0,
        tokens=fmean(numbers[step].tokens for step in used),
        workers=max(1, len(lanes)),
        learners=learners,
        steps=range(used[0], used[-1] + 1),
    )


def _merge(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The time that any of them covers, as spans in order."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def _overlap(spans: Sequence[tuple[float, float]], windows: Sequence[tuple[float, float]]) -> float:
    """Seconds that are in one of ``spans`` and in one of ``windows``, neither of which overlap."""
    return sum(
        max(0.0, min(stop, end) - max(start, begin)) for start, stop in spans for begin, end in windows
    )
