"""Reads the metrics.jsonl of finished or running runs, and averages over the seeds of one recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rltrain.errors import UserError
from rltrain.json_text import parse_json
from rltrain.report.law import student_quantile

Line = dict[str, float]


@dataclass(frozen=True)
class Spread:
    """A number with its 95 % interval; NaN bounds if the interval is unknown."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Curves:
    """One run. steps: one line per training step. evals: one line per evaluation, first to last."""

    steps: tuple[Line, ...]
    evals: tuple[Line, ...]

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """The curves of the run in ``folder``. Raises UserError if it has no training step."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; give the folder of a run")
        lines: list[Line] = []
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                line = parse_json(text)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}); the last line of a run that is still "
                    "writing may be incomplete"
                ) from error
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise UserError(
                    f"{path}, line {number} is no line of metrics, which is a JSON object with a step; got "
                    f"{text:.80}"
                )
            lines.append(line)

        steps = tuple(line for line in lines if "time/step" in line)
        if not steps:
            raise UserError(f"{path} holds no training step")
        return cls(steps, tuple(line for line in lines if any(name.startswith("eval/") for name in line)))

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(steps, values) of ``metric`` in all lines that have it."""
        points = [
            (int(line["step"]), line[metric])
            for line in sorted((*self.steps, *self.evals), key=_step)
            if metric in line
        ]
        return [step for step, _ in points], [value for _, value in points]

    def final(self, metric: str) -> Spread | None:
        """``metric`` of the last evaluation, with its interval over prompts; None if never measured."""
        lines = [line for line in self.evals if metric in line]
        return _with_bounds(lines[-1], metric) if lines else None

    def best(self, metric: str) -> Spread | None:
        """The largest value of ``metric`` over the evaluations; None if never measured."""
        lines = [line for line in self.evals if metric in line]
        return _with_bounds(max(lines, key=lambda line: line[metric]), metric) if lines else None

    @property
    def minutes(self) -> float:
        return sum(line["time/step"] for line in self.steps) / 60

    @property
    def entropy_kept(self) -> float:
        """Mean policy entropy of the last tenth of the steps, divided by that of the first tenth; NaN if no
        entropy was logged.

        If the steps have no entropy, at least two evaluations replace them, with the entropy on held-out
        completions.
        """
        values = self.series("learner/entropy_mean")[1] or self.series("eval/entropy")[1]
        if len(values) < 2 and not self.series("learner/entropy_mean")[1]:
            return math.nan
        tenth = max(1, len(values) // 10)
        start = statistics.fmean(values[:tenth]) if values else 0.0
        return statistics.fmean(values[-tenth:]) / start if start else math.nan

    def last_pass(self, metric: str) -> float | None:
        """Mean of ``metric`` over the steps of the last pass over judged examples; None if no step logs it.

        An example's number is computed before the step that trains on it, so in the second pass it is the
        number after one pass.
        """
        end = max((line["learner/epoch"] for line in self.steps if "learner/epoch" in line), default=0.0)
        values = [
            line[metric]
            for line in self.steps
            if metric in line and line.get("learner/epoch", -math.inf) > end - 1 + 1e-9
        ]
        return statistics.fmean(values) if values else None

    def touched_shares(self) -> dict[str, float]:
        """By control that reports it, the mean share of tokens that it changed; "clip": the share that the
        loss clipped, on either side.
        """
        names = sorted({name for line in self.steps for name in line if name.endswith("_touched")})
        shares = {name.partition("/")[2].removesuffix("_touched"): self._mean(name) for name in names}
        clipped = [
            self._mean(name)
            for name in ("loss/clip_low", "loss/clip_high")
            if any(name in line for line in self.steps)
        ]
        return shares | ({"clip": sum(clipped)} if clipped else {})

    def ceiling(self) -> Spread | None:
        """The reward that the law (``report/law.py``) predicts at zero entropy, from all steps of the run;
        None if the law was not fitted.
        """
        lines = [line for line in self.steps if "law/ceiling" in line]
        return _with_bounds(lines[-1], "law/ceiling") if lines else None

    def _mean(self, metric: str) -> float:
        return statistics.fmean(line[metric] for line in self.steps if metric in line)


def mean_over_runs(runs: Sequence[Curves], measure: Callable[[Curves], Spread | None]) -> Spread | None:
    """Mean of ``measure`` over the runs that have it, with Student's interval; a single run keeps its own
    interval.

    None if no run has it.
    """
    spreads = [spread for run in runs if (spread := measure(run)) is not None]
    if not spreads:
        return None
    return spreads[0] if len(spreads) == 1 else student_mean([spread.value for spread in spreads])


def student_mean(values: Sequence[float]) -> Spread:
    """Mean with Student's 95 % interval over independent values; NaN bounds for fewer than two."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, math.nan, math.nan)
    half_width = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Spread(mean, mean - half_width, mean + half_width)


def _with_bounds(line: Line, metric: str) -> Spread:
    return Spread(line[metric], line.get(f"{metric}_low", math.nan), line.get(f"{metric}_high", math.nan))


def _step(line: Line) -> float:
    return line["step"]
