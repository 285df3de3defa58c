"""Coefficients of loss terms that change during a run: small state machines that observe each step's metrics
once.

A recipe names one in place of a number (``coefficient: {name: target_entropy, target: 0.3}``). ``observe``
gets the metrics of a whole step (all ranks, all micro-batches) after its updates, so an observation takes
effect from the next step on, and every rank holds the same state. The state is plain JSON, and a resumed run
continues from it. This module imports no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from rltrain.needs import GIVES_HISTORY, GIVES_SMOOTHING
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

TURN_ENTROPY = "learner/entropy_turn_"  # the metric of an episode's turn; its number, from 0, follows


class Controller(Protocol):
    """A coefficient of a loss term that changes during the run."""

    def __call__(self) -> float:
        """The coefficient of the current step."""
        ...

    def inputs(self) -> Mapping[str, float | Sequence[float]]:
        """Keyword inputs for the term; a name that is absent keeps the term's default."""
        ...

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Process one step's metrics. Raises ValueError if the metric that it needs is missing."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _SavedController:
    """A controller that saves the attributes named in ``_STATE`` and gives its term no inputs."""

    _STATE: tuple[str, ...]

    def inputs(self) -> Mapping[str, float | Sequence[float]]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])


@method("target_entropy", arxiv="2505.22312")
class TargetEntropy(_SavedController):
    """A bonus that acts only while the entropy is at or below its target, with an adaptive coefficient,
    arXiv:2505.22312.

    Formula: ``c <- clip(c +- step, low, high)``, + if H <= target; the term gets ``c 1[H <= target]``

    After each step the coefficient moves by ``step`` within [low, high]: up if ``metric`` (nats, mean over
    the step) is at or below ``target``, down if it is above. The term gets the coefficient while the last
    entropy was at or below the target, and 0 otherwise. It begins at ``start``. The paper measures the
    entropy of the current step; here it is the previous step's (as in TRL 1.16). Released for R1-Distill-Qwen
    at 7B, with the target of 0.2: step 1e-4, high 0.005.
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
        self.target = target
        self.step = step
        self.low = low
        self.high = high
        self.metric = metric
        self.coefficient = start
        self.last: float | None = None  # nats

    def __call__(self) -> float:
        return self.coefficient if self.last is None or self.last <= self.target else 0.0

    def observe(self, metrics: Mapping[str, float]) -> None:
        entropy = _read_metric("target_entropy", metrics, self.metric)
        if entropy is not None:
            moved = self.coefficient + (self.step if entropy <= self.target else -self.step)
            self.coefficient = _clamp(moved, self.low, self.high)
            self.last = entropy


@method("entropy_band", arxiv="2509.03493")
class EntropyBand(_SavedController):
    """AEnt's coefficient, which moves until the entropy lies in a band, arXiv:2509.03493.

    Formula: ``c <- clip(c - rate (min(0, H - entropy_low) + max(0, H - entropy_high) + pull (c - start)),
    low, high)``

    It moves after each step except the first ``warmup_steps``. H is ``metric``: the clamped entropy, in nats,
    averaged over the step's tokens. The band and the rate have no default in the paper; without them the
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
        unset = [value is None for value in (entropy_low, entropy_high, rate)]
        if any(unset) and not all(unset):
            raise ValueError(
                f"entropy_band: entropy_low is {entropy_low}, entropy_high {entropy_high}, rate {rate}; "
                f"give all three, or none to keep {start:g}"
            )
        if entropy_low is not None and entropy_high is not None:
            _require_order("entropy_band", entropy_low=entropy_low, entropy_high=entropy_high)
        self.start = start
        self.rate = rate
        self.pull = pull
        self.warmup_steps = warmup_steps
        self.metric = metric
        self.band = (entropy_low or 0.0, entropy_high or 0.0)
        self.low = low
        self.high = high
        self.coefficient = start
        self.seen = 0

    def __call__(self) -> float:
        return self.coefficient

    def observe(self, metrics: Mapping[str, float]) -> None:
        entropy = _read_metric("entropy_band", metrics, self.metric)
        self.seen += 1
        if entropy is None or self.rate is None or self.seen <= self.warmup_steps:
            return
        below = min(0.0, entropy - self.band[0])
        above = max(0.0, entropy - self.band[1])
        moved = self.coefficient - self.rate * (below + above + self.pull * (self.coefficient - self.start))
        self.coefficient = _clamp(moved, self.low, self.high)


@method("annealed", arxiv="2506.02208")
class AnnealedCoefficient(_SavedController):
    """KDRL's teacher weight, which falls in a line to a floor, arXiv:2506.02208.

    Formula: ``max(start - slope k, floor)`` in step k = 0, 1, ...
    """

    _STATE = ("steps",)

    def __init__(self, *, start: float = 5e-3, slope: float = 5e-5, floor: float = 1e-3) -> None:
        _require_order("annealed", floor=floor, start=start)
        self.start = start
        self.slope = slope
        self.floor = floor
        self.steps = 0

    def __call__(self) -> float:
        return max(self.start - self.slope * self.steps, self.floor)

    def observe(self, metrics: Mapping[str, float]) -> None:
        del metrics
        self.steps += 1


@method("stage", arxiv="2603.11178")
class StageCoefficient(_SavedController):
    """A term that acts in one stage of the run, between two shares of its steps.

    Formula: ``value 1[begin K <= k < end K]`` in step k of K

    PACED distils with the forward KL first and then with the reverse KL, arXiv:2603.11178; the step at which
    it changes over is not known to us.
    """

    _STATE = ("total_steps", "steps")

    def __init__(self, *, total_steps: int, value: float = 1.0, begin: float = 0.0, end: float = 1.0) -> None:
        _require_order("stage", zero=0.0, begin=begin, end=end, one=1.0)
        self.value = value
        self.begin = begin
        self.end = end
        self.total_steps = total_steps
        self.steps = 0

    def __call__(self) -> float:
        is_active = self.begin * self.total_steps <= self.steps < self.end * self.total_steps
        return self.value if is_active else 0.0

    def observe(self, metrics: Mapping[str, float]) -> None:
        del metrics
        self.steps += 1

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the saved run has another number of steps, and so other stages."""
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved run had a stage in a run of {state['total_steps']} steps, and train.steps is "
                f"{self.total_steps}; keep train.steps, or start a new run"
            )
        super().load_state_dict(state)


def check_history(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    if values["history"] == "turn" and recipe.rollout.environment is None:
        yield (
            "history is turn, and without an environment a completion is one turn; set rollout.environment, "
            "or history: step"
        )


@method("epo_schedule", arxiv="2509.22576", traits={GIVES_HISTORY, GIVES_SMOOTHING}, check=check_history)
class EpoSchedule(_SavedController):
    """EPO's bonus with its constant ``value``, and the inputs of its penalty: the entropy's history and the
    penalty's weight, arXiv:2509.22576.

    Formula: ``value``; paper: ``smoothing = 1 + exp(-gamma k / floor(K / 2))``

    history: mean of ``metric`` (nats) over all earlier steps; absent in the first step, which therefore has
    no penalty. smoothing in step k of the run's ``total_steps`` K depends on schedule: "paper" is the
    formula; "released" is ``strength`` times a weight that falls from 1 to 0.83 by the middle of the run and
    from there to 0.04; "constant" is ``strength`` itself. history "step" is one mean over all tokens, as in
    the paper; "turn" has one for each turn of an episode, over the earlier steps that reached it, as in the
    released code (``TURN_ENTROPY``, which runs with an environment report).
    """

    _STATE = ("total_steps", "steps", "entropy_sum", "counted", "turns")

    def __init__(
        self,
        *,
        total_steps: int,
        value: float = 0.001,
        gamma: float = 3.0,
        strength: float = 1.0,
        schedule: Literal["paper", "released", "constant"] = "paper",
        history: Literal["step", "turn"] = "step",
        metric: str = "learner/entropy_mean",
    ) -> None:
        self.value = value
        self.gamma = gamma
        self.strength = strength
        self.schedule = schedule
        self.history = history
        self.metric = metric
        self.total_steps = total_steps
        self.steps = 0
        self.entropy_sum = 0.0
        self.counted = 0
        self.turns: list[list[float]] = []  # for each turn: the sum of its entropies, and their number

    def __call__(self) -> float:
        return self.value

    def inputs(self) -> Mapping[str, float | Sequence[float]]:
        inputs: dict[str, float | Sequence[float]] = {"smoothing": self._smoothing()}
        if self.history == "turn" and self.turns:
            inputs["history"] = [total / count if count else math.nan for total, count in self.turns]
        elif self.history == "step" and self.counted:
            inputs["history"] = self.entropy_sum / self.counted
        return inputs

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
        entropy = _read_metric("epo_schedule", metrics, self.metric)
        self.steps += 1
        if entropy is not None:
            self.entropy_sum = self.entropy_sum + entropy
            self.counted = self.counted + 1
        if self.history == "turn":
            self._observe_turns(metrics)

    def _observe_turns(self, metrics: Mapping[str, float]) -> None:
        names = [name for name in metrics if name.startswith(TURN_ENTROPY)]
        if not names:
            raise ValueError(
                f"the coefficient epo_schedule with history: turn needs the metrics {TURN_ENTROPY}*, which "
                "the step does not have; set rollout.environment, or history: step"
            )
        for name in names:
            turn = int(name.removeprefix(TURN_ENTROPY))
            while len(self.turns) <= turn:
                self.turns.append([0.0, 0])
            if math.isfinite(metrics[name]):
                self.turns[turn] = [self.turns[turn][0] + metrics[name], self.turns[turn][1] + 1]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "turns": [list(turn) for turn in self.turns]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the saved run has another number of steps, and so another schedule."""
        if self.schedule != "constant" and state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved run had an epo_schedule that ends at {state['total_steps']}, and train.steps is "
                f"{self.total_steps}; keep train.steps, or start a new run"
            )
        super().load_state_dict({"turns": [], **state, "total_steps": self.total_steps})


@method("kl_target", arxiv="2510.08457")
class KlTarget(_SavedController):
    """A KL weight that keeps the KL near a target, moved in log space, as ARES releases it, arXiv:2510.08457.

    Formula: ``ln c <- clip(ln c + rate clip(e, -cap, cap))``, e the smoothed ``KL / target - 1``

    ``metric`` (nats, mean over the step) is smoothed with ``decay``; its relative error is KL / target - 1.
    Once every ``every`` steps, if that is at least ``dead_zone`` in size, it is smoothed with the same decay
    and moves c by ``rate``, at most ``cap``; c begins at ``start`` and stays inside [low, high] times
    ``start``. In the release start is a fixed coefficient, multiplied by a factor that moves inside these
    bounds. ARES has one factor for each difficulty of a prompt and counts micro-batches; here there is one
    for the term, and it counts steps. Set metric to the term's own metric if the term is not ``kl``.
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
                f"[0, 1), every {every} at least 1"
            )
        self.target = target
        self.rate = rate
        self.decay = decay
        self.cap = cap
        self.dead_zone = dead_zone
        self.every = every
        self.metric = metric
        self.low = low * start
        self.high = high * start
        self.coefficient = start
        self.seen = 0
        self.error = 0.0
        self.kl: float | None = None  # nats, smoothed

    def __call__(self) -> float:
        return self.coefficient

    def observe(self, metrics: Mapping[str, float]) -> None:
        kl = _read_metric("kl_target", metrics, self.metric)
        self.seen += 1
        if kl is None:
            return
        self.kl = kl if self.kl is None else (1 - self.decay) * kl + self.decay * self.kl
        error = self.kl / self.target - 1
        if abs(error) < self.dead_zone or self.seen % self.every:
            return
        self.error = (1 - self.decay) * error + self.decay * self.error
        moved = math.log(self.coefficient) + self.rate * _clamp(self.error, -self.cap, self.cap)
        self.coefficient = math.exp(_clamp(moved, math.log(self.low), math.log(self.high)))


def _read_metric(name: str, metrics: Mapping[str, float], key: str) -> float | None:
    """The metric ``key``, or None if it is not a finite number: such a step changes no coefficient.

    Raises ValueError if it is absent.
    """
    if key not in metrics:
        matches = difflib.get_close_matches(key, metrics, n=1, cutoff=0.5)
        hint = f"; did you mean {matches[0]!r}?" if matches else ""
        raise ValueError(f"coefficient {name} needs the metric {key!r}, which the step does not have{hint}")
    return metrics[key] if math.isfinite(metrics[key]) else None


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _require_order(name: str, **values: float) -> None:
    """Raises ValueError unless ``values`` ascend."""
    ordered = list(values.values())
    if ordered != sorted(ordered):
        listing = ", ".join(f"{key} {value:g}" for key, value in values.items())
        raise ValueError(f"coefficient {name}: {listing}: each may be at most the next")
