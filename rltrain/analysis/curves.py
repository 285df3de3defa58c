"""What finished or running runs left in their metrics.jsonl, and the same over the seeds of one recipe."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rltrain.errors import UserError
from rltrain.report.law import student_quantile

Line = dict[str, float]


@dataclass(frozen=True)
class Spread:
    """A number with its 95 % interval; NaN bounds where nothing says how far it spreads."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.value:.3f}"
            if math.isnan(self.low)
            else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        )


@dataclass(frozen=True)
class Curves:
    """One run. ``steps``: a line per training step. ``evals``: a line per evaluation, first to last."""

    steps: tuple[Line, ...]
    evals: tuple[Line, ...]

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """Raises UserError where the folder holds no run with a step in it."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; give the folder of a run")
        lines: list[Line] = []
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}); a running writer's last line may be half "
                    "there"
                ) from error
        steps = tuple(line for line in lines if "time/step" in line)
        if not steps:
            raise UserError(f"{path} holds no training step")
        return cls(steps, tuple(line for line in lines if any(name.startswith("eval/") for name in line)))

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(steps, values) of ``metric``, wherever it was logged."""
        found = [
            (int(line["step"]), line[metric])
            for line in sorted((*self.steps, *self.evals), key=_step)
            if metric in line
        ]
        return [step for step, _ in found], [value for _, value in found]

    def final(self, metric: str) -> Spread | None:
        """Of the last evaluation, with its interval over prompts; None where it was never measured."""
        lines = [line for line in self.evals if metric in line]
        return _with_bounds(lines[-1], metric) if lines else None

    def best(self, metric: str) -> Spread | None:
        lines = [line for line in self.evals if metric in line]
        return _with_bounds(max(lines, key=lambda line: line[metric]), metric) if lines else None

    @property
    def minutes(self) -> float:
        return sum(line["time/step"] for line in self.steps) / 60

    @property
    def entropy_kept(self) -> float:
        """Mean policy entropy of the last tenth of the steps over that of the first tenth; NaN where there is
        none.

        Where no step samples, evaluations take the steps' place, with the entropy on held-out completions, if
        there are two.
        """
        values = self.series("learner/entropy_mean")[1] or self.series("eval/entropy")[1]
        if len(values) < 2 and not self.series("learner/entropy_mean")[1]:
            return math.nan
        tenth = max(1, len(values) // 10)
        start = statistics.fmean(values[:tenth]) if values else 0.0
        return statistics.fmean(values[-tenth:]) / start if start else math.nan

    def last_pass(self, metric: str) -> float | None:
        """Mean of ``metric`` over the steps of the last pass over judged examples; None where none logs it.

        An example's number is from before the step that trains on it: after one earlier pass, say, in the
        second.
        """
        end = max((line["learner/epoch"] for line in self.steps if "learner/epoch" in line), default=0.0)
        found = [
            line[metric]
            for line in self.steps
            if metric in line and line.get("learner/epoch", -math.inf) > end - 1 + 1e-9
        ]
        return statistics.fmean(found) if found else None

    def touched(self) -> dict[str, float]:
        """By control that says so, the mean share of tokens it touched; "clip": of those that the
        loss clipped, on either side.
        """
        names = sorted({name for line in self.steps for name in line if name.endswith("_touched")})
        found = {name.partition("/")[2].removesuffix("_touched"): self._mean(name) for name in names}
        clipped = [
            self._mean(name)
            for name in ("loss/clip_low", "loss/clip_high")
            if any(name in line for line in self.steps)
        ]
        return found | ({"clip": sum(clipped)} if clipped else {})

    def ceiling(self) -> Spread | None:
        """The reward that the law (``law.py``) expects with entropy spent, from all of the run's
        steps; None where it was not fitted.
        """
        lines = [line for line in self.steps if "law/ceiling" in line]
        return _with_bounds(lines[-1], "law/ceiling") if lines else None

    def _mean(self, metric: str) -> float:
        return statistics.fmean(line[metric] for line in self.steps if metric in line)


def over_seeds(runs: Sequence[Curves], number: Callable[[Curves], Spread | None]) -> Spread | None:
    """Mean over the runs that have it, with Student's interval; of a single run its own interval.

    None where no run has it.
    """
    found = [one for run in runs if (one := number(run)) is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else student([one.value for one in found])


def student(values: Sequence[float]) -> Spread:
    """Mean with Student's 95 % interval over independent values; no bounds for fewer than two."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, math.nan, math.nan)
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half)


def _with_bounds(line: Line, metric: str) -> Spread:
    return Spread(line[metric], line.get(f"{metric}_low", math.nan), line.get(f"{metric}_high", math.nan))


def _step(line: Line) -> float:
    return line["step"]
