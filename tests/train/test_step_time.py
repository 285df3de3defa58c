"""What ``rltrain plan`` predicts of a step that samples while it learns, against the schedules themselves on
a clock that only the injected times move.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rltrain.config.capacity.measured import MeasuredStep, StepNumbers, measure_step
from rltrain.config.capacity.overlap import Split, StepCost, divide_gpus
from rltrain.errors import UserError
from rltrain.process import ALONE
from rltrain.reward.score import Score
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler
from rltrain.rollout.source import Rollouts
from rltrain.rollout.window import Window
from rltrain.timeline import Interval
from rltrain.train.bounded import BoundedRollouts
from rltrain.train.lagged import LaggedRollouts
from rltrain.types.samples import Completion, PolicyVersion, Prompt, Request, RolloutGroup, Sampling, Span

SIZE = 24  # groups of a step
STEPS = 30
SKIPPED = 6  # first steps, before workers and learner are in step
PROMPTS = tuple(Prompt(f"p{place}", (place,), "") for place in range(SIZE))


@dataclass
class Clock:
    """intervals: what a run's timeline says of its steps, and of workers that take one group at a time."""

    now: float = 0.0
    intervals: list[Interval] = field(default_factory=list)

    def note(self, lane: str, kind: str, start: float, stop: float, **facts: Any) -> None:
        self.intervals.append(Interval(lane, kind, start, stop, facts))

    def take_step(self, step: int, take: Callable[[], object], learn: Callable[[], None]) -> None:
        """learn: the time until the weights are pushed."""
        start = self.now
        take()
        self.note("learner", "wait", start, self.now, step=step)
        start = self.now
        learn()
        self.note("learner", "learn", start, self.now, step=step)

    def push(self, seconds: float) -> None:
        self.note("learner", "push", self.now, self.now + seconds)
        self.now += seconds


@dataclass
class TimedWorkers:
    """Implements ``FreeEngine``: ``rows`` groups at a time, each of which takes ``seconds()``."""

    clock: Clock
    rows: int
    seconds: Callable[[], float]
    version: PolicyVersion = 0
    queue: list[tuple[int, Request]] = field(default_factory=list)
    ends: list[tuple[float, int, Request, PolicyVersion]] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    busy: dict[int, tuple[int, float]] = field(default_factory=dict)  # group -> who samples it, since when

    def __post_init__(self) -> None:
        self.idle = list(range(self.rows))

    def begin(self, number: int, request: Request, policy: PolicyVersion) -> None:
        self.queue.append((number, request))
        self._fill(self.clock.now)

    def _fill(self, now: float) -> None:
        while self.queue and len(self.ends) < self.rows:
            number, request = self.queue.pop(0)
            self.busy[number] = self.idle.pop(0), now
            heapq.heappush(self.ends, (now + self.seconds(), number, request, self.version))

    def next(self) -> tuple[int, RolloutGroup]:
        """The next group; the clock goes on to its end, if that is not over."""
        end, number, request, version = heapq.heappop(self.ends)
        worker, start = self.busy.pop(number)
        self.clock.note(f"worker {worker}", "sample", start, end)
        self.idle.append(worker)
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


def measure_bound(
    rows: int, seconds: Callable[[], float], learning: float, push: float, clock: Clock | None = None
) -> float:
    """Seconds of a step on average, with a bound of two versions."""
    clock = clock or Clock()
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
        take, learn = partial(source.take, step, step - 1), partial(learn_while, source, workers, learning)
        clock.take_step(step, take, learn)
        clock.push(push)
        workers.push(push)
        ends.append(clock.now)
    last = STEPS - 3  # the last steps draw nothing
    return (ends[last - 1] - ends[SKIPPED - 1]) / (last - SKIPPED)


def learn_while(source: BoundedRollouts, workers: TimedWorkers, seconds: float) -> None:
    """The workers' groups arrive meanwhile."""
    busy_until = workers.clock.now + seconds
    while workers.ends and workers.ends[0][0] <= busy_until:
        source.receive()
    workers.clock.now = busy_until


@dataclass
class TimedSource:
    """The part of ``JournaledRollouts`` that a lag uses, with a controller that samples a step at a time."""

    clock: Clock
    sampling: Callable[[], float]  # notes when its workers are busy
    observed: int = 0

    def begin(self, step: int, version: int, *, draws: bool = True) -> Callable[[], Rollouts]:
        end = self.clock.now + self.sampling()

        def wait() -> Rollouts:
            self.clock.now = max(self.clock.now, end)
            return Rollouts((), 1, 1, (), {})

        return wait


def measure_lag(
    rows: int,
    seconds: Callable[[], float],
    learning: float,
    push: float,
    lag: int = 1,
    clock: Clock | None = None,
) -> float:
    clock = clock or Clock()

    def sample_step() -> float:
        rests = [(0.0, worker) for worker in range(rows)]
        for _ in range(SIZE):
            rest, worker = rests[0]
            heapq.heapreplace(rests, (rest + seconds(), worker))
        for rest, worker in rests:
            clock.note(f"worker {worker}", "sample", clock.now, clock.now + rest)
        return max(rest for rest, _ in rests)

    def learn() -> None:
        clock.now += learning
        source.settle()

    source = LaggedRollouts(
        cast("Any", TimedSource(clock, sample_step)), lag, STEPS, overlaps=lag > 0, has_thread=False
    )
    ends: list[float] = []
    for step in range(1, STEPS + 1):
        clock.take_step(step, partial(source.take, step, step - 1), learn)
        clock.push(push)
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


def measured(clock: Clock, learning: float, learners: int, *, ahead: int, runs_freely: bool) -> MeasuredStep:
    """What the timeline of a run says, with what its metrics say of the learner."""
    numbers = {step: StepNumbers(learning, 1000.0) for step in range(1, STEPS + 1)}
    return measure_step(
        clock.intervals, numbers, learners, ahead=ahead, runs_freely=runs_freely, overlaps=True
    )


@pytest.mark.parametrize("work", [(24.0, 10.0), (24.0, 24.0), (8.0, 40.0)])
def test_measured_rates_predict_every_other_split_of_a_bounded_run(work: tuple[float, float]) -> None:
    """A run with two workers and one learner is measured; steps with one to seven of eight GPUs for the
    workers take what is predicted from it, within a tenth, and the best split is the fastest one.
    """
    sampling, learning = work
    clock = Clock()
    measure_bound(2, draw_lengths(sampling / SIZE), learning, 0.2, clock)
    held = measured(clock, learning, 1, ahead=2, runs_freely=True)
    assert (held.workers, held.learners, held.push) == (2, 1, pytest.approx(0.2))
    taken: dict[int, float] = {}
    for workers in range(1, 8):
        cost = held.predict(8 - workers, workers, overlaps=True)
        taken[workers] = measure_bound(workers, draw_lengths(sampling / SIZE), learning / (8 - workers), 0.2)
        assert cost.seconds == pytest.approx(taken[workers], rel=0.1)
    split = divide_gpus(8, 1, lambda learners, servers: held.predict(learners, servers, overlaps=True))
    assert split is not None and taken[split.server_gpus] <= 1.1 * min(taken.values())


@pytest.mark.parametrize("learning", [2.0, 8.0, 20.0])
@pytest.mark.parametrize("lag", [1, 2])
def test_measured_rates_predict_a_lagged_run(lag: int, learning: float) -> None:
    clock = Clock()
    measure_lag(3, lambda: 1.0, learning, 0.5, lag, clock)
    held = measured(clock, learning, 1, ahead=lag, runs_freely=False)
    assert held.sampling == pytest.approx(SIZE / 3)
    for workers in (2, 4, 6, 8):
        cost = held.predict(2, workers, overlaps=True)
        assert cost.seconds == pytest.approx(
            measure_lag(workers, lambda: 1.0, learning / 2, 0.5, lag), rel=0.1
        )
    half = held.predict(1, 3, overlaps=True, size=0.5)
    assert (half.sampling, half.learning) == (pytest.approx(SIZE / 6), learning / 2)


def test_a_run_that_is_too_short_or_has_no_worker_in_its_timeline_cannot_be_measured() -> None:
    clock = Clock()
    measure_lag(3, lambda: 1.0, 2.0, 0.5, 1, clock)
    learner = [each for each in clock.intervals if each.lane == "learner"]
    numbers = {step: StepNumbers(2.0, 1.0) for step in range(1, STEPS + 1)}
    with pytest.raises(UserError, match=r"has no worker.*schedule sync"):
        measure_step(learner, numbers, 1, ahead=1, runs_freely=False, overlaps=True)
    taking_turns = measure_step(learner, numbers, 1, ahead=1, runs_freely=False, overlaps=False)
    assert taking_turns.workers == 1  # the engine in the learner's process
    short = [each for each in clock.intervals if each.facts.get("step", 1) <= 3]
    with pytest.raises(UserError, match=r"has 3 steps with times, and 4 are needed"):
        measure_step(short, numbers, 1, ahead=1, runs_freely=False, overlaps=True)
