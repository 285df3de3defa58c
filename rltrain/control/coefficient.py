"""Coefficients of loss terms that change in the course of a run: small state machines told each step's
metrics once.

A recipe writes one in place of a number (``coefficient: {name: target_entropy, target: 0.3}``). ``observe``
sees the metrics of a whole step (all ranks, all micro-batches) after its updates, so what a controller learns
in a step acts from the next one on, and every rank holds the same state. State is plain JSON: a resumed run
continues it. Importable without torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from rltrain.registry import method

__all__ = [
    "AnnealedCoefficient",
    "Controller",
    "EntropyBand",
    "EpoSchedule",
    "KlTarget",
    "StageCoefficient",
    "TargetEntropy",
]


class Controller(Protocol):
    """What a term's coefficient may be beside a number."""

    def __call__(self) -> float:
        """The coefficient of the step in hand."""
        ...

    def inputs(self) -> Mapping[str, float]:
        """Numbers that its term takes as keyword inputs; a name that is absent stays the term's default."""
        ...

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take in one step's metrics. Raises ValueError when the one it lives on is not among them."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Remembering:
    """The state of a controller: the attributes that ``_STATE`` names, and nothing for its term."""

    _STATE: tuple[str, ...]

    def inputs(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])


@method("target_entropy", arxiv="2505.22312")
class TargetEntropy(_Remembering):
    """A bonus only while entropy is at or below its target, with a coefficient found step by step,
    arXiv:2505.22312.

    After each step the coefficient moves by ``step``: up where ``metric`` (nats, mean over the step) is at or
    below ``target``, down where it is above, inside [low, high]; the term gets it while the last entropy was
    at or below the target, and 0 otherwise. It begins at ``start``. The paper measures the entropy of the
    step in hand; here it is the step before (as in TRL 1.16).
    """

    _STATE = ("coefficient", "last")

    def __init__(
        self,
        *,
        start: float = 0.0,
        target: float = 0.2,
        step: float = 0.005,
        low: float = 0.0,
        high: float = 1.0,
        metric: str = "learner/entropy_mean",
    ) -> None:
        _require_order("target_entropy", low=low, start=start, high=high)
        self.target, self.step, self.low, self.high, self.metric = target, step, low, high, metric
        self.coefficient = start
        self.last: float | None = None  # nats

    def __call__(self) -> float:
        return self.coefficient if self.last is None or self.last <= self.target else 0.0

    def observe(self, metrics: Mapping[str, float]) -> None:
        entropy = _finite("target_entropy", metrics, self.metric)
        if entropy is not None:
            moved = self.coefficient + (self.step if entropy <= self.target else -self.step)
            self.coefficient, self.last = _bounded(moved, self.low, self.high), entropy


@method("entropy_band", arxiv="2509.03493")
class EntropyBand(_Remembering):
    """AEnt's coefficient, driven until the entropy lies in a band, arXiv:2509.03493.

    ``c <- clip(c - rate (min(0, H - entropy_low) + max(0, H - entropy_high) + pull (c - start)), low, high)``
    after each step but the first ``warmup_steps``, H being ``metric``: the clamped entropy, in nats, mean
    over the step's tokens. The band and the rate have no default in the paper; with one of them None the
    coefficient stays at ``start``. Released for Qwen2.5-1.5B on GSM8K: band [0.05, 0.23], rate 1e-3, range
    [1e-5, 3e-3], 29 warm-up steps.
    """

    _STATE = ("coefficient", "seen")

    def __init__(
        self,
        *,
        start: float = 2e-4,
        entropy_low: float | None = None,
        entropy_high: float | None = None,
        rate: float | None = None,
        pull: float = 0.0,
        low: float = 4e-5,
        high: float = 0.1,
        warmup_steps: int = 0,
        metric: str = "loss/clamped_entropy_nats",
    ) -> None:
        _require_order("entropy_band", low=low, start=start, high=high)
        given = [value for value in (entropy_low, entropy_high, rate) if value is not None]
        if given and len(given) < 3:
            raise ValueError(
                f"entropy_band: entropy_low is {entropy_low}, entropy_high {entropy_high}, rate {rate}; "
                f"give all three, or none to keep {start:g}"
            )
        if entropy_low is not None and entropy_high is not None:
            _require_order("entropy_band", entropy_low=entropy_low, entropy_high=entropy_high)
        self.start, self.rate, self.pull, self.warmup_steps, self.metric = (
            start,
            rate,
            pull,
            warmup_steps,
            metric,
        )
        self.band = (entropy_low or 0.0, entropy_high or 0.0)
        self.low, self.high = low, high
        self.coefficient, self.seen = start, 0

    def __call__(self) -> float:
        return self.coefficient

    def observe(self, metrics: Mapping[str, float]) -> None:
        entropy = _finite("entropy_band", metrics, self.metric)
        self.seen += 1
        if entropy is None or self.rate is None or self.seen <= self.warmup_steps:
            return
        below, above = min(0.0, entropy - self.band[0]), max(0.0, entropy - self.band[1])
        moved = self.coefficient - self.rate * (below + above + self.pull * (self.coefficient - self.start))
        self.coefficient = _bounded(moved, self.low, self.high)


@method("annealed", arxiv="2506.02208")
class AnnealedCoefficient(_Remembering):
    """KDRL's weight of the teacher: ``max(start - slope * step, floor)``, counted from step 0,
    arXiv:2506.02208.
    """

    _STATE = ("steps",)

    def __init__(self, *, start: float = 5e-3, slope: float = 5e-5, floor: float = 1e-3) -> None:
        _require_order("annealed", floor=floor, start=start)
        self.start, self.slope, self.floor = start, slope, floor
        self.steps = 0

    def __call__(self) -> float:
        return max(self.start - self.slope * self.steps, self.floor)

    def observe(self, metrics: Mapping[str, float]) -> None:
        del metrics
        self.steps += 1


@method("stage", arxiv="2603.11178")
class StageCoefficient(_Remembering):
    """A term that acts in one stage of the run: ``value`` from the share ``begin`` of its steps up to the
    share ``end``, else 0.

    PACED distils under the forward KL first and the reverse KL then, arXiv:2603.11178; where one gives way to
    the other was not read.
    """

    _STATE = ("total_steps", "steps")

    def __init__(self, *, total_steps: int, value: float = 1.0, begin: float = 0.0, end: float = 1.0) -> None:
        _require_order("stage", zero=0.0, begin=begin, end=end, one=1.0)
        self.value, self.begin, self.end = value, begin, end
        self.total_steps, self.steps = total_steps, 0

    def __call__(self) -> float:
        return (
            self.value if self.begin * self.total_steps <= self.steps < self.end * self.total_steps else 0.0
        )

    def observe(self, metrics: Mapping[str, float]) -> None:
        del metrics
        self.steps += 1

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the saved run was to end at another step: its stages were others."""
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the steps taken had a stage of a run of {state['total_steps']} steps, and train.steps is "
                f"{self.total_steps}; "
                f"keep train.steps, or start a new run"
            )
        super().load_state_dict(state)


@method("epo_schedule", arxiv="2509.22576", traits={"gives_history", "gives_smoothing"})
class EpoSchedule(_Remembering):
    """EPO's bonus with its constant ``value``, and what its smoothing needs: the entropy's history, the
    penalty's weight, arXiv:2509.22576.

    history: mean of ``metric`` (nats) over all steps before; nothing in the first step, which therefore has
    no penalty. smoothing, in step k of the ``total_steps`` K of the run, by schedule: "paper" is ``1 +
    exp(-gamma k / floor(K / 2))``; "released" is ``strength`` times a weight that falls from 1 to 0.83 by the
    middle of the run and from there to 0.04; "constant" is ``strength`` itself. One mean over all tokens, as
    the paper writes it: the release keeps one for each turn of an episode.
    """

    _STATE = ("total_steps", "steps", "entropy_sum", "counted")

    def __init__(
        self,
        *,
        total_steps: int,
        value: float = 0.001,
        gamma: float = 3.0,
        strength: float = 1.0,
        schedule: Literal["paper", "released", "constant"] = "paper",
        metric: str = "learner/entropy_mean",
    ) -> None:
        self.value, self.gamma, self.strength, self.schedule, self.metric = (
            value,
            gamma,
            strength,
            schedule,
            metric,
        )
        self.total_steps, self.steps, self.entropy_sum, self.counted = total_steps, 0, 0.0, 0

    def __call__(self) -> float:
        return self.value

    def inputs(self) -> Mapping[str, float]:
        found = {"smoothing": self._smoothing()}
        return found | {"history": self.entropy_sum / self.counted} if self.counted else found

    def _smoothing(self) -> float:
        middle = max(self.total_steps // 2, 1)
        if self.schedule == "paper":
            return 1 + math.exp(-self.gamma * self.steps / middle)
        if self.schedule == "constant":
            return self.strength
        step = min(self.steps, self.total_steps)
        if step <= middle:
            return self.strength * (1 - 0.2 * (1 - math.exp(-2 * step / middle)))
        return self.strength * 0.8 * math.exp(-3 * (step - middle) / max(self.total_steps - middle, 1))

    def observe(self, metrics: Mapping[str, float]) -> None:
        entropy = _finite("epo_schedule", metrics, self.metric)
        self.steps += 1
        if entropy is not None:
            self.entropy_sum, self.counted = self.entropy_sum + entropy, self.counted + 1

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the saved run was to end at another step: its schedule was another one."""
        if self.schedule != "constant" and state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the steps taken had an epo_schedule that ends at {state['total_steps']}, and train.steps "
                f"is {self.total_steps}; "
                f"keep train.steps, or start a new run"
            )
        super().load_state_dict({**state, "total_steps": self.total_steps})


@method("kl_target", arxiv="2510.08457")
class KlTarget(_Remembering):
    """A KL weight that keeps the KL near a target, moved in log space, as ARES releases it, arXiv:2510.08457.

    ``metric`` (nats, mean over the step) is smoothed with ``decay``; its relative error e = KL / target - 1
    counts where |e| is at least ``dead_zone``, and then, once every ``every`` steps, is smoothed with the
    same decay and moves ln c by ``rate * clip(error, -cap, cap)``; c begins at ``start`` and stays inside
    [low, high] times ``start``. In the release start is a fixed coefficient and what moves a factor beside
    it, inside these bounds. ARES keeps one for each difficulty of a prompt and counts micro-batches; here it
    is one for the term, and steps. Give the term's own metric when it is not ``kl``.
    """

    _STATE = ("coefficient", "kl", "error", "seen")

    def __init__(
        self,
        *,
        start: float = 0.01,
        target: float = 0.01,
        rate: float = 0.05,
        decay: float = 0.97,
        cap: float = 0.2,
        dead_zone: float = 0.02,
        every: int = 100,
        low: float = 1e-4,
        high: float = 100.0,
        metric: str = "loss/kl",
    ) -> None:
        _require_order("kl_target", low=low, one=1.0, high=high)
        if not (target > 0 and start > 0 and low > 0 and 0 <= decay < 1 and every >= 1):
            raise ValueError(
                f"kl_target: target {target}, start {start} and low {low} must be positive, decay {decay} in "
                "[0, 1), "
                f"every {every} at least 1"
            )
        self.target, self.rate, self.decay, self.cap, self.dead_zone = target, rate, decay, cap, dead_zone
        self.every, self.metric = every, metric
        self.low, self.high = low * start, high * start
        self.coefficient, self.seen, self.error = start, 0, 0.0
        self.kl: float | None = None  # nats, smoothed

    def __call__(self) -> float:
        return self.coefficient

    def observe(self, metrics: Mapping[str, float]) -> None:
        found = _finite("kl_target", metrics, self.metric)
        self.seen += 1
        if found is None:
            return
        self.kl = found if self.kl is None else (1 - self.decay) * found + self.decay * self.kl
        error = self.kl / self.target - 1
        if abs(error) < self.dead_zone or self.seen % self.every:
            return
        self.error = (1 - self.decay) * error + self.decay * self.error
        moved = math.log(self.coefficient) + self.rate * _bounded(self.error, -self.cap, self.cap)
        self.coefficient = math.exp(_bounded(moved, math.log(self.low), math.log(self.high)))


def _finite(name: str, metrics: Mapping[str, float], key: str) -> float | None:
    """The metric ``key``, None where it is no finite number: such a step moves nothing.

    Raises ValueError where it is absent.
    """
    if key not in metrics:
        near = difflib.get_close_matches(key, metrics, n=1, cutoff=0.5)
        raise ValueError(
            f"coefficient {name} lives on the metric {key!r}, which the step does not "
            f"have{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    return metrics[key] if math.isfinite(metrics[key]) else None


def _bounded(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _require_order(name: str, **values: float) -> None:
    """Raises ValueError unless ``values`` ascend."""
    ordered = list(values.values())
    if ordered != sorted(ordered):
        said = ", ".join(f"{key} {value:g}" for key, value in values.items())
        raise ValueError(f"coefficient {name}: {said}: each may be at most the next")
