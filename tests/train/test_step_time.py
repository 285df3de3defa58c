"""What ``rltrain plan`` predicts of a step that samples while it learns, against the schedules themselves on
a clock that only the injected times move.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rltrain.config.capacity.overlap import Split, StepCost, divide_gpus
from rltrain.process import ALONE
from rltrain.reward.score import Score
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler
from rltrain.rollout.source import Rollouts
from rltrain.rollout.window import Window
from rltrain.train.bounded import BoundedRollouts
from rltrain.train.lagged import LaggedRollouts
from rltrain.types.samples import Completion, PolicyVersion, Prompt, Request, RolloutGroup, Sampling, Span

SIZE = 24  # groups of a step
STEPS = 30
SKIPPED = 6  # first steps, before workers and learner are in step
PROMPTS = tuple(Prompt(f"p{place}", (place,), "") for place in range(SIZE))


@dataclass
class Clock:
    now: float = 0.0


@dataclass
class TimedWorkers:
    """Implements ``FreeEngine``: ``rows`` groups at a time, each of which takes ``seconds()``."""

    clock: Clock
    rows: int
    seconds: Callable[[], float]
    version: PolicyVersion = 0
    queue: list[tuple[int, Request]] = field(default_factory=list)
    ends: list[tuple[float, int, Request, PolicyVersion]] = field(default_factory=list)

    def begin(self, number: int, request: Request, policy: PolicyVersion) -> None:
        self.queue.append((number, request))
        self._fill(self.clock.now)

    def _fill(self, now: float) -> None:
        while self.queue and len(self.ends) < self.rows:
            number, request = self.queue.pop(0)
            heapq.heappush(self.ends, (now + self.seconds(), number, request, self.version))

    def next(self) -> tuple[int, RolloutGroup]:
        """The next group; the clock goes on to its end, if that is not over."""
        end, number, request, version = heapq.heappop(self.ends)
        self.clock.now = max(self.clock.now, end)
        self._fill(end)
        completion = Completion((1,), (-1.0,), "stop", "", (Span(0, 1, version),))
        return number, RolloutGroup(number, request.prompt, (completion,))

    def push(self, seconds: float) -> None:
        """All workers stand still meanwhile."""
        self.ends = [(end + seconds, number, request, version) for end, number, request, version in self.ends]
        self.version += 1

    def give_up(self, number: int) -> None:
        raise AssertionError(number)

    def find_start(self, number: int) -> PolicyVersion | None: ...

    def close(self) -> None: ...


class Order:
    def next(self) -> list[int]:
        return list(range(SIZE))

    def observe(self, metrics: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Grader:
    def score(self, groups: Any) -> list[list[Score]]:
        return [[Score(0.0)] for _ in groups]


def do_nothing() -> None: ...


def measure_bound(rows: int, seconds: Callable[[], float], learning: float, push: float) -> float:
    """Seconds of a step on average, with a bound of two versions."""
    clock = Clock()
    workers = TimedWorkers(clock, rows, seconds)
    graded = GradedSampler(cast("Any", SimpleNamespace(name="fake", close=do_nothing)), Grader(), ALONE)
    sampling = Sampling(1, 1.0, 4, 0)
    inner = ColocatedRollouts(graded, Order(), PROMPTS, sampling, SIZE, 1, do_nothing, do_nothing, do_nothing)
    waiting = SimpleNamespace(
        numbers=list, remove=lambda numbers: None, read=lambda *_: None, write=lambda *_: None
    )
    source = BoundedRollouts(
        inner, workers, Window(2, SIZE, waits=True), cast("Any", waiting), STEPS, str, has_thread=False
    )
    ends: list[float] = []
    for step in range(1, STEPS + 1):
        source.take(step, step - 1)
        busy_until = clock.now + learning
        while workers.ends and workers.ends[0][0] <= busy_until:
            source.receive()
        clock.now = busy_until + push
        workers.push(push)
        ends.append(clock.now)
    last = STEPS - 3  # the last steps draw nothing
    return (ends[last - 1] - ends[SKIPPED - 1]) / (last - SKIPPED)


@dataclass
class TimedSource:
    """The part of ``JournaledRollouts`` that a lag uses, with a controller that samples a step at a time."""

    clock: Clock
    sampling: Callable[[], float]
    observed: int = 0

    def begin(self, step: int, version: int, *, draws: bool = True) -> Callable[[], Rollouts]:
        end = self.clock.now + self.sampling()

        def wait() -> Rollouts:
            self.clock.now = max(self.clock.now, end)
            return Rollouts((), 1, 1, (), {})

        return wait


def measure_lag(rows: int, seconds: Callable[[], float], learning: float, push: float, lag: int = 1) -> float:
    def sample_step() -> float:
        rests = [0.0] * rows
        for _ in range(SIZE):
            heapq.heapreplace(rests, rests[0] + seconds())
        return max(rests)

    clock = Clock()
    source = LaggedRollouts(
        cast("Any", TimedSource(clock, sample_step)), lag, STEPS, overlaps=lag > 0, has_thread=False
    )
    ends: list[float] = []
    for step in range(1, STEPS + 1):
        source.take(step, step - 1)
        clock.now += learning
        source.settle()
        clock.now += push
        ends.append(clock.now)
    return (ends[STEPS - 3] - ends[SKIPPED - 1]) / (STEPS - 2 - SKIPPED)


def draw_lengths(mean: float) -> Callable[[], float]:
    """Times of groups between half and one and a half of ``mean``."""
    chance = random.Random(0)
    return lambda: mean * (0.5 + chance.random())


@pytest.mark.parametrize("push", [0.0, 0.5])
@pytest.mark.parametrize("learning", [2.0, 6.0, 18.0])
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_step_takes_what_the_slower_one_of_the_two_takes(rows: int, learning: float, push: float) -> None:
    """Within a tenth, and never more than 1.10 times the slower one and the push."""
    sampling = SIZE / rows
    predicted = StepCost(sampling, learning, push, overlaps=True)
    assert predicted.bottleneck == ("sampling" if sampling >= learning else "learning")
    for measure, seconds in (
        (measure_bound, draw_lengths(1.0)),
        (measure_bound, lambda: 1.0),
        (measure_lag, lambda: 1.0),
    ):
        measured = measure(rows, seconds, learning, push)
        assert measured == pytest.approx(predicted.seconds, rel=0.1)
        assert measured <= 1.10 * max(sampling, learning) + push


def test_without_a_lag_they_take_turns() -> None:
    predicted = StepCost(6.0, 5.0, 0.5, overlaps=False)
    assert measure_lag(4, lambda: 1.0, 5.0, 0.5, lag=0) == pytest.approx(predicted.seconds) == 11.5


@pytest.mark.parametrize("work", [(24.0, 10.0), (24.0, 24.0), (8.0, 40.0)])
def test_the_best_split_is_the_fastest_one(work: tuple[float, float]) -> None:
    """Of eight GPUs. work: seconds of sampling and learning on one of them."""
    sampling, learning = work
    split = divide_gpus(
        8, 1, lambda learners, servers: StepCost(sampling / servers, learning / learners, 0.2, overlaps=True)
    )
    assert split is not None and split.learner_gpus + split.server_gpus == 8
    measured = {
        servers: measure_bound(servers, draw_lengths(sampling / SIZE), learning / (8 - servers), 0.2)
        for servers in range(1, 8)
    }
    assert measured[split.server_gpus] <= 1.1 * min(measured.values())
    assert measured[split.server_gpus] == pytest.approx(split.cost.seconds, rel=0.1)


def test_workers_of_several_gpus_and_a_learner_of_one() -> None:
    cost = lambda learners, servers: StepCost(24.0 / servers, 1.0 / learners, 0.0, overlaps=True)  # noqa: E731
    assert divide_gpus(8, 4, cost) == Split(4, 4, StepCost(6.0, 0.25, 0.0, overlaps=True))
    assert divide_gpus(8, 2, cost, most_learners=1) == Split(1, 6, StepCost(4.0, 1.0, 0.0, overlaps=True))
    assert divide_gpus(8, 8, cost) is None
    assert divide_gpus(8, 1, lambda *_: None) is None
