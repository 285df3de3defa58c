"""The law between reward and entropy, R = -a exp(H) + b, fitted during a run (arXiv:2505.22617).

H is the mean token entropy of a step (nats), R the reward of the same policy. Two series are fitted. "train"
pairs a step's entropy with its share of correct completions (with their mean reward if no reward function
reports correctness); it has a point per step, always on new prompts. "eval" pairs held-out pass@1 with the
entropy of the next step's samples, which come from the evaluated weights. At H = 0, when no entropy is left,
the law's ceiling is b - a.

The fit is ordinary least squares in x = exp(H). Intervals are 95 % Student intervals of a, b and b - a. The
steps of one run are not independent, so the number of points is reduced to ``n (1 - r) / (1 + r)`` where the
residuals of neighbouring points are correlated (r > 0). The intervals measure how well the line through these
points is known, not whether the law continues to hold: the ceiling is an extrapolation. Under dynamic
sampling the train series has only the kept groups, whose rewards are biased towards one half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Bounded", "Law", "LawFit", "fit_law", "student_quantile"]

MIN_POINTS = 8  # with fewer points a line through noise predicts nothing
_SMOOTH = 5  # steps over which the entropy is averaged, for the first and the current entropy
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)  # for the integral in student_quantile
SPENT = 0.05  # entropy is exhausted when at most this share of exp(H) - 1 at the start is left


@dataclass(frozen=True, slots=True)
class Bounded:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LawFit:
    """R = -a exp(H) + b through ``points`` points. If a is positive, reward falls with entropy."""

    a: Bounded
    b: Bounded
    ceiling: Bounded  # b - a, at H = 0
    points: int

    def reward_at(self, entropy: float) -> float:
        """The reward that the law predicts at ``entropy`` nats."""
        return self.b.value - self.a.value * math.exp(entropy)

    def limit_note(self) -> str:
        """What must be said of a ceiling above 1 where rewards are shares; empty for others."""
        above = self.ceiling.value - 1
        return (
            f", {above:.3f} above the largest possible share, so the line bends before" if above > 0 else ""
        )

    def slope(self, entropy: float) -> float:
        """dR/dH at ``entropy`` nats."""
        return -self.a.value * math.exp(entropy)


def fit_law(entropy: Sequence[float], reward: Sequence[float]) -> LawFit | None:
    """Least squares over points in temporal order; None for fewer than three points, or if all
    entropies are equal.
    """
    if len(entropy) != len(reward):
        raise ValueError(f"{len(entropy)} entropies but {len(reward)} rewards")
    x = np.exp(np.asarray(entropy, dtype=np.float64))
    y = np.asarray(reward, dtype=np.float64)
    count = len(x)
    if count < 3 or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return None

    center = x.mean()
    spread = np.square(x - x.mean()).sum()
    a = -float(((x - center) * y).sum() / spread)
    b = float(y.mean() + a * center)
    residual = y - (b - a * x)
    independent = _count_independent(residual)
    variance = float(np.square(residual).sum()) / (count - 2) * count / independent
    quantile = student_quantile(max(independent - 2, 1.0))

    def add_interval(value: float, factor: float) -> Bounded:
        """factor: the value's variance relative to that of a residual, for independent points."""
        half_width = quantile * math.sqrt(variance * factor)
        return Bounded(value, value - half_width, value + half_width)

    def line_variance(x: float) -> float:
        return 1 / count + (x - center) ** 2 / spread

    return LawFit(
        a=add_interval(a, 1 / spread),
        b=add_interval(b, line_variance(0.0)),
        ceiling=add_interval(b - a, line_variance(1.0)),
        points=count,
    )


def _count_independent(residual: np.ndarray) -> float:
    """The effective number of independent points, from the correlation of each residual with the previous."""
    total = float(np.square(residual).sum())
    if total == 0:
        return float(len(residual))
    correlation = min(max(float((residual[1:] * residual[:-1]).sum()) / total, 0.0), 0.99)
    return max(len(residual) * (1 - correlation) / (1 + correlation), 3.0)


def student_quantile(dof: float) -> float:
    """t such that Student's distribution has 95 % inside +-t. dof: degrees of freedom, not always whole.

    Newton's method on the integrated density.
    """
    log_scale = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(dof * math.pi)
    # t = sqrt(dof) tan(angle); the density in the angle is scale sqrt(dof) cos(angle) ** (dof - 1)
    angle = 1.2
    for _ in range(60):
        points = angle / 2 * (_NODES + 1)
        probability = (
            math.exp(log_scale)
            * math.sqrt(dof)
            * angle
            / 2
            * float((_WEIGHTS * np.cos(points) ** (dof - 1)).sum())
        )
        density = math.exp(log_scale) * math.sqrt(dof) * math.cos(angle) ** (dof - 1)
        step = (probability - 0.475) / max(density, 1e-12)
        angle = min(max(angle - step, angle / 2), (angle + math.pi / 2) / 2)
        if abs(step) < 1e-14:
            break
    return math.sqrt(dof) * math.tan(angle)


class Law:
    """Collects every step and evaluation of a run, and fits the law to them.

    State is plain JSON.
    """

    def __init__(self) -> None:
        # by series, (entropy in nats, reward)
        self.points: dict[str, list[tuple[float, float]]] = {"train": [], "eval": []}
        self.evaluated: float | None = None  # pass@1 of weights whose entropy the next step measures
        self.are_shares = False  # whether rewards are shares of right completions, at most 1
        self.is_announced = False  # whether the user was told that entropy is exhausted
        self._fits: dict[str, tuple[int, LawFit | None]] = {}  # by series, (points fitted, fit)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Takes held-out results; pass@1 waits for the next step's entropy."""
        self.evaluated = metrics.get("eval/pass@1")

    def step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds one step and returns the ``law/*`` metrics, empty while there are too few points to fit."""
        entropy = metrics["learner/entropy_mean"]
        self.are_shares = "reward/correct" in metrics
        reward = metrics.get("reward/correct", metrics["reward/mean"])
        if math.isfinite(entropy) and self.evaluated is not None:
            self.points["eval"].append((entropy, self.evaluated))
        self.evaluated = None
        if math.isfinite(entropy) and math.isfinite(reward):
            self.points["train"].append((entropy, reward))
        return self.metrics()

    def metrics(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for series, prefix in (("train", "law/"), ("eval", "law/eval_")):
            fit = self.fit(series)
            if fit is None:
                continue
            for name, bounded in (("a", fit.a), ("b", fit.b), ("ceiling", fit.ceiling)):
                values |= {
                    f"{prefix}{name}": bounded.value,
                    f"{prefix}{name}_low": bounded.low,
                    f"{prefix}{name}_high": bounded.high,
                }
            values[f"{prefix}gain_left"] = fit.ceiling.value - fit.reward_at(self._recent_entropy())
        if values:
            values |= {"law/entropy_left": self.entropy_left(), "law/exhausted": float(self.is_exhausted())}
        return values

    def fit(self, series: str) -> LawFit | None:
        """The fit of series "train" or "eval"; None with fewer than MIN_POINTS points.

        It is cached, because a step asks for it four times and a long run has many points.
        """
        points = self.points[series]
        cached = self._fits.get(series)
        if cached is None or cached[0] != len(points):
            fit = fit_law(*zip(*points, strict=True)) if len(points) >= MIN_POINTS else None
            cached = (len(points), fit)
            self._fits[series] = cached
        return cached[1]

    def entropy_left(self) -> float:
        """Share of exp(H) - 1 at the start that is left: by the law, the share of the reward that entropy
        can still be traded for.
        """
        start = [entropy for entropy, _ in self.points["train"][:_SMOOTH]]
        at_start = math.exp(sum(start) / len(start)) - 1
        return (math.exp(self._recent_entropy()) - 1) / at_start if at_start > 0 else 0.0

    def is_exhausted(self) -> bool:
        """Whether almost no entropy is left to trade.

        False if reward does not fall with entropy: then the law predicts nothing.
        """
        fit = self.fit("train")
        return fit is not None and fit.a.low > 0 and self.entropy_left() <= SPENT

    def message(self) -> str | None:
        """A message for the user when entropy is first exhausted; None otherwise."""
        fit = self.fit("train")
        if self.is_announced or fit is None or not self.is_exhausted():
            return None
        self.is_announced = True
        end = fit.ceiling
        gain_left = end.value - fit.reward_at(self._recent_entropy())
        return (
            f"entropy is exhausted: {self.entropy_left():.0%} of exp(H) - 1 at the start is left; "
            f"by R = -a exp(H) + b the reward ends near {end.value:.3f} [{end.low:.3f}, {end.high:.3f}], "
            f"{gain_left:.3f} above now{fit.limit_note() if self.are_shares else ''}"
        )

    def _recent_entropy(self) -> float:
        entropies = [entropy for entropy, _ in self.points["train"][-_SMOOTH:]]
        return sum(entropies) / len(entropies)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "evaluated": self.evaluated, "said": self.is_announced}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points = {
            name: [(entropy, reward) for entropy, reward in points]
            for name, points in state["points"].items()
        }
        self.evaluated = state["evaluated"]
        self.is_announced = state["said"]
        self._fits = {}
