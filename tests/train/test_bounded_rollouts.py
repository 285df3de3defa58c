"""Groups that workers finish in any order, on a clock of events: no token is older than the bound, no step
waits for ever, and a run that is killed at any event goes on with what it has on the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rltrain.checkpoint.journal import Journal, StepHeader, StepRecord, WaitingGroups
from rltrain.process import ALONE
from rltrain.reward.score import Score
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler
from rltrain.rollout.source import Rollouts
from rltrain.rollout.window import Window
from rltrain.train.bounded import BoundedRollouts
from rltrain.train.journaled import JournaledRollouts
from rltrain.types.samples import (
    Completion,
    PolicyVersion,
    Prompt,
    Request,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    Span,
)

PROMPTS = tuple(Prompt(f"p{place}", (place,), "") for place in range(7))
UPDATES = 3  # of a step: versions are numbers of updates


class Killed(BaseException):
    """The process's end."""


@dataclass
class Disk:
    """What outlives a process."""

    steps: dict[int, StepRecord] = field(default_factory=dict)
    waiting: dict[int, tuple[ScoredGroup, dict[int, str]]] = field(default_factory=dict)


@dataclass
class MemoryJournal:
    """The part of ``Journal`` that a source uses."""

    disk: Disk

    def read_header(self, step: int) -> StepHeader:
        return self.read(step).header

    def read(self, step: int) -> StepRecord:
        if step not in self.disk.steps:
            raise FileNotFoundError(step)
        return self.disk.steps[step]

    def write(self, record: StepRecord) -> None:
        self.disk.steps[record.header.step] = record

    def prune(self) -> None: ...


@dataclass
class MemoryWaiting:
    """The part of ``WaitingGroups`` that a source uses."""

    disk: Disk

    def write(self, number: int, group: ScoredGroup, weights: Mapping[int, str]) -> None:
        self.disk.waiting[number] = group, dict(weights)

    def read(self, number: int, prompt: str, weights: Mapping[int, str]) -> ScoredGroup | None:
        group, written = self.disk.waiting.get(number, (None, {}))
        if group is None or group.prompt.id != prompt:
            return None
        return group if all(weights.get(each) == digest for each, digest in written.items()) else None

    def numbers(self) -> list[int]:
        return sorted(self.disk.waiting)

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.disk.waiting.pop(number, None)


@dataclass
class Clock:
    """Counts events and ends the process at some of them."""

    kills: set[int]
    now: int = 0

    def tick(self) -> None:
        self.now += 1
        if self.now in self.kills:
            raise Killed


@dataclass
class Workers:
    """Implements ``FreeEngine``: ``rows`` groups at a time, which end in the order that ``choose`` says."""

    clock: Clock
    rows: int
    update: str
    choose: Callable[[int], int]
    version: PolicyVersion = 0
    waiting: dict[int, Request] = field(default_factory=dict)
    running: dict[int, tuple[Request, list[PolicyVersion]]] = field(default_factory=dict)
    ended: list[tuple[int, RolloutGroup]] = field(default_factory=list)

    def begin(self, number: int, request: Request, policy: PolicyVersion) -> None:
        assert policy == self.version
        self.waiting[number] = request
        self._fill()

    def _fill(self) -> None:
        while self.waiting and len(self.running) < self.rows:
            number = next(iter(self.waiting))
            self.running[number] = self.waiting.pop(number), [self.version]

    def give_up(self, number: int) -> None:
        self.waiting.pop(number, None)
        self.running.pop(number, None)
        self.ended = [each for each in self.ended if each[0] != number]
        self._fill()

    def find_start(self, number: int) -> PolicyVersion | None:
        return self.running[number][1][0] if number in self.running else None

    def push(self, version: PolicyVersion) -> None:
        while self.update == "drain" and self.running:
            self.ended.append(self._end(min(self.running)))
        self.version = version
        for number, (request, versions) in self.running.items():
            ages = [version] if self.update == "abort" else [*versions, version]
            self.running[number] = request, list(dict.fromkeys(ages))
        self._fill()

    def next(self) -> tuple[int, RolloutGroup]:
        self.clock.tick()
        if self.ended:
            return self.ended.pop(0)
        assert self.running, "a step waits for ever"
        ordered = sorted(self.running)
        ended = self._end(ordered[self.choose(len(ordered))])
        self._fill()
        return ended

    def _end(self, number: int) -> tuple[int, RolloutGroup]:
        request, versions = self.running.pop(number)
        spans = tuple(Span(place, place + 1, version) for place, version in enumerate(versions))
        tokens = tuple((request.sampling.seed + place) % 97 for place in range(len(spans)))
        completion = Completion(tokens, (-1.0,) * len(spans), "stop", "", spans)
        return number, RolloutGroup(number, request.prompt, (completion,) * request.count)

    def close(self) -> None: ...


class Grader:
    def score(self, groups: Any) -> list[list[Score]]:
        return [[Score(0.0)] * len(group.completions) for group in groups]


@dataclass
class Order:
    """Two rounds of prompts, again and again."""

    size: int
    rounds: int = 0

    def next(self) -> list[int]:
        self.rounds += 1
        return [(self.rounds * self.size + place) % len(PROMPTS) for place in range(self.size)]

    def observe(self, metrics: Mapping[str, float]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]


@dataclass(frozen=True)
class Case:
    versions: int
    size: int
    steps: int
    rows: int
    update: str
    waits: bool
    every: int  # steps between checkpoints


def do_nothing() -> None: ...


def open_source(case: Case, workers: Workers, disk: Disk, digest: Callable[[], str]) -> Any:
    graded = GradedSampler(cast("Any", SimpleNamespace(name="fake", close=int)), Grader(), ALONE)
    inner = ColocatedRollouts(
        graded,
        Order(case.size),
        PROMPTS,
        Sampling(2, 1.0, 8, 5),
        case.size,
        1,
        do_nothing,
        do_nothing,
        do_nothing,
    )
    bounded = BoundedRollouts(
        inner,
        workers,
        Window(case.versions, case.size, case.waits),
        cast("WaitingGroups", MemoryWaiting(disk)),
        case.steps,
        digest,
        has_thread=False,
    )
    journal = cast("Journal", MemoryJournal(disk))
    return bounded, JournaledRollouts(bounded, journal, ALONE, digest, settings="s")


@dataclass
class Run:
    """A learner whose weights are the digest of everything that it was trained on."""

    case: Case
    kills: set[int]
    choose: Callable[[int], int]
    disk: Disk = field(default_factory=Disk)
    trained: dict[int, tuple[ScoredGroup, ...]] = field(default_factory=dict)
    saved: tuple[int, str, dict[str, Any] | None] = (0, "", None)
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.kills)

    def train(self) -> None:
        while True:
            try:
                return self._train_once()
            except Killed:
                continue

    def _train_once(self) -> None:
        done, weights, state = self.saved
        held = [weights]
        workers = Workers(self.clock, self.case.rows, self.case.update, self.choose, done * UPDATES)
        bounded, source = open_source(self.case, workers, self.disk, lambda: held[0])
        if state is not None:
            source.load_state_dict(state)
        for step in range(done + 1, self.case.steps + 1):
            rollouts = source.take(step, (step - 1) * UPDATES)
            self.clock.tick()
            self._check(step, rollouts)
            held[0] = hashlib.sha256(f"{held[0]} {rollouts.groups}".encode()).hexdigest()
            source.settle()
            workers.push(step * UPDATES)
            self.clock.tick()
            for _ in range(self.choose(3)):
                if workers.ended or workers.running:
                    bounded.receive()
            if step % self.case.every == 0:
                self.saved = step, held[0], source.state_dict()
                self.clock.tick()
        source.close()

    def _check(self, step: int, rollouts: Rollouts) -> None:
        assert len(rollouts.groups) == self.case.size
        for group in rollouts.groups:
            for completion in group.completions:
                ages = [step - 1 - span.version // UPDATES for span in completion.versions]
                assert min(ages) >= 0 and max(ages) <= self.case.versions
        # what was trained on before the process's end is trained on again
        assert self.trained.setdefault(step, rollouts.groups) == rollouts.groups


CASES = st.builds(
    Case,
    versions=st.integers(0, 3),
    size=st.integers(1, 3),
    steps=st.integers(1, 7),
    rows=st.integers(1, 6),
    update=st.sampled_from(["in_flight", "abort", "drain"]),
    waits=st.booleans(),
    every=st.integers(1, 3),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=CASES, kills=st.sets(st.integers(1, 60), max_size=4), data=st.data())
def test_the_bound_holds_in_every_order_and_after_every_kill(
    case: Case, kills: set[int], data: st.DataObject
) -> None:
    run = Run(case, kills, lambda count: data.draw(st.integers(0, count - 1)))
    run.train()
    assert sorted(run.trained) == list(range(1, case.steps + 1))
    state = run.disk.steps[case.steps].header.state["window"]
    outstanding = len(state["draws"])
    assert state["drawn"] == case.steps * case.size + state["dropped"] + outstanding
    assert outstanding == 0 and (state["dropped"] == 0 or not case.waits)
    assert not run.disk.waiting
    if case.waits:  # each draw once
        order = Order(case.size)
        drawn = [PROMPTS[place].id for _ in range(case.steps) for place in order.next()]
        assert sorted(group.prompt.id for groups in run.trained.values() for group in groups) == sorted(drawn)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=CASES, data=st.data())
def test_with_a_bound_of_none_the_order_of_arrival_does_not_show(case: Case, data: st.DataObject) -> None:
    case = dataclasses.replace(case, versions=0)
    run = Run(case, set(), lambda count: data.draw(st.integers(0, count - 1)))
    run.train()
    first = Run(case, set(), lambda count: 0)
    first.train()
    assert run.trained == first.trained


def test_every_event_of_a_run_may_be_its_last() -> None:
    case = Case(versions=2, size=2, steps=5, rows=3, update="in_flight", waits=True, every=2)
    uninterrupted = Run(case, set(), lambda count: count - 1)
    uninterrupted.train()
    events = uninterrupted.clock.now
    assert events > 20
    for event in range(1, events + 1):
        run = Run(case, {event}, lambda count: count - 1)
        run.train()
        assert len(run.trained) == case.steps


def test_groups_that_are_there_are_not_sampled_again_after_a_kill() -> None:
    case = Case(versions=2, size=2, steps=3, rows=6, update="in_flight", waits=True, every=1)
    begun: list[int] = []

    class Counting(Workers):
        def begin(self, number: int, request: Request, policy: PolicyVersion) -> None:
            begun.append(number)
            super().begin(number, request, policy)

    disk = Disk()
    for is_second in (False, True):
        workers = Counting(Clock(set()), case.rows, case.update, lambda count: 0)
        bounded, source = open_source(case, workers, disk, lambda: "weights")
        source.take(1, 0)
        if not is_second:  # one more is there when the process ends, before any checkpoint
            bounded.receive()
            assert begun == [1, 2, 3, 4, 5, 6] and sorted(disk.waiting) == [1, 2, 3]
    assert begun == [1, 2, 3, 4, 5, 6]  # step 1 is in the journal
    bounded.take(2, 0)
    assert begun == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_a_token_that_is_too_old_ends_the_run() -> None:
    window = Window(versions=1, size=1, waits=True)
    for version in (0, 3, 6):
        window.advance(version)
    completion = Completion((5, 6), (-1.0, -1.0), "stop", "", (Span(0, 1, 0), Span(1, 2, 6)))
    group = ScoredGroup(0, PROMPTS[0], (completion,), (Score(0.0),))
    with pytest.raises(RuntimeError, match=r"tokens 0 to 1 of a completion of prompt 'p0' \(draw 4\)"):
        window.require_young(4, group)
