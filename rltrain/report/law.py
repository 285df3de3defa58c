"""The law that ties reward to entropy, R = -a exp(H) + b, fitted while a run goes on, arXiv:2505.22617.

H is the mean token entropy of a step (nats), R the reward of the same policy. Two series are fitted: "train",
a step's entropy and its share of correct completions (their mean reward where no reward function says), which
is dense and on ever new prompts; and "eval", held-out pass@1 and the entropy of the next step's samples,
which are of the very weights that were evaluated. With entropy spent, H = 0, the law's ceiling is b - a.

Ordinary least squares in x = exp(H). Intervals are 95 % Student intervals of a, b and b - a, with the number
of points reduced to ``n (1 - r) / (1 + r)`` where the residuals of neighbouring points are correlated (r >
0): steps of one run are not independent. They say how well a line through these points is known, not that the
law goes on to hold: the ceiling is an extrapolation. Under dynamic sampling the train series is of the groups
that were kept, whose rewards are pulled towards one half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Bounded", "Law", "LawFit", "fit_law", "student_quantile"]

MIN_POINTS = 8  # below, a straight line through noise is no forecast
_SMOOTH = 5  # steps over which the entropy is averaged, at the start and now, to say what is left of it
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)  # of the integral in student_quantile
SPENT = 0.05  # entropy is exhausted when this share of the way from exp(H) at the start to 1 is left


@dataclass(frozen=True, slots=True)
class Bounded:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LawFit:
    """R = -a exp(H) + b through ``points`` points. A reward falls with entropy where a is positive."""

    a: Bounded
    b: Bounded
    ceiling: Bounded  # b - a, at H = 0
    points: int

    def at(self, entropy: float) -> float:
        """The reward that the law expects at ``entropy`` nats."""
        return self.b.value - self.a.value * math.exp(entropy)

    def slope(self, entropy: float) -> float:
        """dR/dH at ``entropy`` nats."""
        return -self.a.value * math.exp(entropy)


def fit_law(entropy: Sequence[float], reward: Sequence[float]) -> LawFit | None:
    """Least squares over points in the order of time; None for fewer than three, or where the
    entropies are all equal.
    """
    if len(entropy) != len(reward):
        raise ValueError(f"{len(entropy)} entropies but {len(reward)} rewards")
    x, y = np.exp(np.asarray(entropy, dtype=np.float64)), np.asarray(reward, dtype=np.float64)
    count = len(x)
    if count < 3 or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return None
    middle, spread = x.mean(), np.square(x - x.mean()).sum()
    a = -float(((x - middle) * y).sum() / spread)
    b = float(y.mean() + a * middle)
    residual = y - (b - a * x)
    independent = _independent(residual)
    variance = float(np.square(residual).sum()) / (count - 2) * count / independent
    quantile = student_quantile(max(independent - 2, 1.0))

    def bounded(value: float, factor: float) -> Bounded:
        """factor: the value's variance over that of a residual, for independent points."""
        half = quantile * math.sqrt(variance * factor)
        return Bounded(value, value - half, value + half)

    def of_line(x: float) -> float:
        return 1 / count + (x - middle) ** 2 / spread

    return LawFit(bounded(a, 1 / spread), bounded(b, of_line(0.0)), bounded(b - a, of_line(1.0)), count)


def _independent(residual: np.ndarray) -> float:
    """How many independent points the residuals are worth, by their correlation with the one before."""
    total = float(np.square(residual).sum())
    if total == 0:
        return float(len(residual))
    correlation = min(max(float((residual[1:] * residual[:-1]).sum()) / total, 0.0), 0.99)
    return max(len(residual) * (1 - correlation) / (1 + correlation), 3.0)


def student_quantile(freedom: float) -> float:
    """t such that Student's distribution has 95 % inside +-t; freedom may be broken.

    By Newton on the integrated density.
    """
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    # t = sqrt(freedom) tan(angle); the density in the angle is scale sqrt(freedom) cos(angle) ** (freedom -
    # 1)
    angle = 1.2
    for _ in range(60):
        points = angle / 2 * (_NODES + 1)
        inside = (
            math.exp(log_scale)
            * math.sqrt(freedom)
            * angle
            / 2
            * float((_WEIGHTS * np.cos(points) ** (freedom - 1)).sum())
        )
        density = math.exp(log_scale) * math.sqrt(freedom) * math.cos(angle) ** (freedom - 1)
        step = (inside - 0.475) / max(density, 1e-12)
        angle = min(max(angle - step, angle / 2), (angle + math.pi / 2) / 2)
        if abs(step) < 1e-14:
            break
    return math.sqrt(freedom) * math.tan(angle)


class Law:
    """Watches a run: takes in every step and evaluation, and says what the law has to say.

    State is plain JSON.
    """

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[float, float]]] = {
            "train": [],
            "eval": [],
        }  # (entropy in nats, reward)
        self.evaluated: float | None = None  # pass@1 of weights whose entropy the next step will tell
        self.said = False  # that entropy is exhausted
        self._fits: dict[str, tuple[int, LawFit | None]] = {}  # by series, with the points it went through

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Held-out results; pass@1 waits for the next step's entropy."""
        self.evaluated = metrics.get("eval/pass@1")

    def step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in one step; the ``law/*`` metrics that follow, empty while there is too little to fit."""
        entropy = metrics["learner/entropy_mean"]
        reward = metrics.get("reward/correct", metrics["reward/mean"])
        if math.isfinite(entropy) and self.evaluated is not None:
            self.points["eval"].append((entropy, self.evaluated))
        self.evaluated = None
        if math.isfinite(entropy) and math.isfinite(reward):
            self.points["train"].append((entropy, reward))
        return self.metrics()

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for series, prefix in (("train", "law/"), ("eval", "law/eval_")):
            fit = self.fit(series)
            if fit is None:
                continue
            for name, one in (("a", fit.a), ("b", fit.b), ("ceiling", fit.ceiling)):
                found |= {
                    f"{prefix}{name}": one.value,
                    f"{prefix}{name}_low": one.low,
                    f"{prefix}{name}_high": one.high,
                }
            found[f"{prefix}gain_left"] = fit.ceiling.value - fit.at(self._recent())
        if found:
            found |= {"law/entropy_left": self.entropy_left(), "law/exhausted": float(self.exhausted())}
        return found

    def fit(self, series: str) -> LawFit | None:
        """Of "train" or "eval"; None with fewer than MIN_POINTS points."""
        points = self.points[series]
        fitted = self._fits.get(series)
        if fitted is None or fitted[0] != len(
            points
        ):  # a step asks four times, and a long run has many points
            fitted = (len(points), fit_law(*zip(*points, strict=True)) if len(points) >= MIN_POINTS else None)
            self._fits[series] = fitted
        return fitted[1]

    def entropy_left(self) -> float:
        """Share of exp(H) - 1 at the start that is still there: of the reward that entropy can be
        traded for, by the law.
        """
        start = [entropy for entropy, _ in self.points["train"][:_SMOOTH]]
        at_start = math.exp(sum(start) / len(start)) - 1
        return (math.exp(self._recent()) - 1) / at_start if at_start > 0 else 0.0

    def exhausted(self) -> bool:
        """Whether hardly any entropy is left to trade.

        False where reward does not fall with entropy: then the law says nothing.
        """
        fit = self.fit("train")
        return fit is not None and fit.a.low > 0 and self.entropy_left() <= SPENT

    def message(self) -> str | None:
        """Said once, when entropy has just been exhausted."""
        fit = self.fit("train")
        if self.said or fit is None or not self.exhausted():
            return None
        self.said = True
        end, gain = fit.ceiling, fit.ceiling.value - fit.at(self._recent())
        return (
            f"entropy is exhausted: {self.entropy_left():.0%} of what the run began with is left; "
            f"by R = -a exp(H) + b the reward ends near {end.value:.3f} [{end.low:.3f}, {end.high:.3f}], "
            f"{gain:.3f} above now"
        )

    def _recent(self) -> float:
        last = [entropy for entropy, _ in self.points["train"][-_SMOOTH:]]
        return sum(last) / len(last)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "evaluated": self.evaluated, "said": self.said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points = {
            name: [(entropy, reward) for entropy, reward in points]
            for name, points in state["points"].items()
        }
        self.evaluated, self.said, self._fits = state["evaluated"], state["said"], {}
