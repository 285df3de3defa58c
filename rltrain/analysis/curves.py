"""Reads the metrics.jsonl of finished or running runs, and averages over the seeds of one recipe."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rltrain.errors import UserError
from rltrain.json_text import parse_json
from rltrain.report.law import student_quantile

Line = dict[str, float]
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)
_SHARES = ("pass@", "avg@", "accuracy", "brier", "ece")


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
    """One run. steps: one line per training step. evals: one line per evaluation, first to last.

    A number that is not finite is NaN in its line; ``nonfinite`` counts such lines by metric.
    """

    steps: tuple[Line, ...]
    evals: tuple[Line, ...]
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """The curves of the run in ``folder``. Raises UserError if it has no training step."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; give the folder of a run")
        lines: list[Line] = []
        nonfinite: Counter[str] = Counter()
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = parse_json(text)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}); the last line of a run that is still "
                    "writing may be incomplete"
                ) from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError(
                    f"{path}, line {number} is no line of metrics, which is a JSON object with a step; got "
                    f"{text:.80}"
                )
            nonfinite.update(list(record.pop("nonfinite", {})))
            lines.append({name: math.nan if value is None else value for name, value in record.items()})

        steps = tuple(line for line in lines if "time/step" in line)
        if not steps:
            raise UserError(f"{path} holds no training step")
        evals = tuple(line for line in lines if any(name.startswith("eval/") for name in line))
        return cls(steps, evals, dict(nonfinite), folder)

    @property
    def samples(self) -> bool:
        """Whether the run trains on completions that it samples, not on a data set of judged ones."""
        return any("rollout/completions" in line for line in self.steps)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(steps, values) of ``metric`` in all lines where it is finite."""
        points = [
            (int(line["step"]), line[metric])
            for line in sorted((*self.steps, *self.evals), key=_step)
            if _is_finite(line, metric)
        ]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def has_share_rewards(self) -> bool:
        """Whether the law's rewards are shares of right completions, at most 1."""
        return any("reward/correct" in line for line in self.steps)

    def law_points(self) -> list[tuple[float, float]]:
        """(entropy in nats, reward) of every step with both, as ``report/law.py`` pairs them."""
        points = [
            (
                line.get("learner/entropy_mean", math.nan),
                line.get("reward/correct", line.get("reward/mean", math.nan)),
            )
            for line in self.steps
        ]
        return [point for point in points if all(map(math.isfinite, point))]

    def first(self, metric: str) -> Spread | None:
        """``metric`` of the evaluation before the first step; None if it was not measured there."""
        lines = [line for line in self.evals if metric in line and line["step"] == 0]
        return _with_bounds(lines[0], metric) if lines else None

    def final(self, metric: str) -> Spread | None:
        """``metric`` of the last evaluation, with its interval over prompts; None if never measured."""
        lines = [line for line in self.evals if metric in line]
        return _with_bounds(lines[-1], metric) if lines else None

    def best(self, metric: str) -> Spread | None:
        """The largest value of ``metric`` over the evaluations; None if never measured."""
        lines = [line for line in self.evals if _is_finite(line, metric)]
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
            if _is_finite(line, metric) and line.get("learner/epoch", -math.inf) > end - 1 + 1e-9
        ]
        return statistics.fmean(values) if values else None

    def touched_shares(self) -> dict[str, float]:
        """By control that reports it, the mean share of tokens that it changed; "clip": the share that the
        loss clipped, on either side.
        """
        names = sorted(
            {
                name
                for line in self.steps
                for name in line
                if name.endswith("_touched") and _is_finite(line, name)
            }
        )
        shares = {name.partition("/")[2].removesuffix("_touched"): self._mean(name) for name in names}
        clipped = [
            self._mean(name)
            for name in ("loss/clip_low", "loss/clip_high")
            if any(_is_finite(line, name) for line in self.steps)
        ]
        return shares | ({"clip": sum(clipped)} if clipped else {})

    def ceiling(self) -> Spread | None:
        """The reward that the law (``report/law.py``) predicts at zero entropy, from all steps of the run;
        None if the law was not fitted.
        """
        lines = [line for line in self.steps if "law/ceiling" in line]
        return _with_bounds(lines[-1], "law/ceiling") if lines else None

    def _mean(self, metric: str) -> float:
        return statistics.fmean(line[metric] for line in self.steps if _is_finite(line, metric))


def mean_over_runs(
    runs: Sequence[Curves], measure: Callable[[Curves], Spread | None], within: Range = ANY
) -> Spread | None:
    """Mean of ``measure`` over the runs that have it, with Student's interval, cut to the range ``within``; a
    single run keeps its own interval.

    None if no run has it.
    """
    spreads = [spread for run in runs if (spread := measure(run)) is not None]
    if not spreads:
        return None
    return spreads[0] if len(spreads) == 1 else student_mean([spread.value for spread in spreads], within)


def student_mean(values: Sequence[float], within: Range = ANY) -> Spread:
    """Mean with Student's 95 % interval over independent values, cut to the range that they can be in; NaN
    bounds for fewer than two.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, math.nan, math.nan)
    half_width = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Spread(mean, max(mean - half_width, within[0]), min(mean + half_width, within[1]))


def range_of(measure: str) -> Range:
    """What a held-out metric can be: a share is in [0, 1]."""
    short = measure.partition("/")[2]
    return (0.0, 1.0) if short.startswith(_SHARES) else ANY


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last ``width`` values, over fewer at the start."""
    return [sum(values[max(0, end - width) : end]) / min(end, width) for end in range(1, len(values) + 1)]


def _with_bounds(line: Line, metric: str) -> Spread:
    return Spread(line[metric], line.get(f"{metric}_low", math.nan), line.get(f"{metric}_high", math.nan))


def _is_finite(line: Line, metric: str) -> bool:
    return math.isfinite(line.get(metric, math.nan))


def _step(line: Line) -> float:
    return line["step"]
