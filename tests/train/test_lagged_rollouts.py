"""Which step is sampled when, for every lag and wherever a run is stopped: a model of the schedule alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.rollout.source import Rollouts
from rltrain.train.journaled import JournaledRollouts
from rltrain.train.lagged import LaggedRollouts


@dataclass
class RecordedSource:
    """The part of ``JournaledRollouts`` that a lag uses. disk: what was sampled, which outlives a run."""

    disk: dict[int, Rollouts]
    asked: list[tuple[int, int]] = field(default_factory=list)
    observed: list[int] = field(default_factory=list)  # what the next step's sampling depends on
    origins: dict[int, str] = field(default_factory=dict)
    journal: Any = field(default_factory=lambda: SimpleNamespace(path=str))

    def begin(self, step: int, version: int, *, draws: bool = True) -> Callable[[], Rollouts]:
        self.origins[step] = f"{step} of {version} after {self.observed}"

        def sample() -> Rollouts:
            self.asked.append((step, version))
            metrics = {"step": float(step), "version": float(version), "observed": float(sum(self.observed))}
            self.disk[step] = Rollouts((), step, 1, (), {"rollout": 1.0}, metrics)
            return self.disk[step]

        return sample

    def find(self, step: int, origin: str) -> Rollouts | None:
        self.origins[step] = origin
        return self.disk.get(step)

    def observe(self, metrics: Mapping[str, float], *_: Any) -> None:
        self.observed.append(int(metrics["step"]))

    def state_dict(self) -> dict[str, Any]:
        return {"observed": list(self.observed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.observed[:] = state["observed"]


def run(lag: int, steps: int, stops: set[int], *, overlaps: bool) -> tuple[list[Any], list[tuple[int, int]]]:
    """What each step trains on, and what was sampled. stops: steps after which the process ends and another
    one loads the state.
    """
    disk: dict[int, Rollouts] = {}
    inner = RecordedSource(disk)
    source = LaggedRollouts(cast("JournaledRollouts", inner), lag, steps, overlaps)
    asked = list[tuple[int, int]]()
    trained: list[Any] = []
    for step in range(1, steps + 1):
        rollouts = source.take(step, step - 1)
        trained.append((rollouts.generated_groups, dict(rollouts.metrics)))
        source.settle()
        source.observe({"step": float(step)})
        if step in stops:
            state = source.state_dict()
            asked += inner.asked
            inner = RecordedSource(disk)
            source = LaggedRollouts(cast("JournaledRollouts", inner), lag, steps, overlaps)
            source.load_state_dict(state)
    return trained, asked + inner.asked


@settings(max_examples=80, deadline=None)
@given(
    lag=st.integers(0, 5),
    steps=st.integers(1, 9),
    stops=st.sets(st.integers(1, 9), max_size=4),
    overlaps=st.booleans(),
)
def test_the_schedule_is_kept_whatever_happens(lag: int, steps: int, stops: set[int], overlaps: bool) -> None:
    trained, asked = run(lag, steps, stops, overlaps=overlaps)
    versions = [max(0, step - 1 - lag) for step in range(1, steps + 1)]
    assert asked == [(step, version) for step, version in enumerate(versions, 1)]  # each once, in order
    for step, version in enumerate(versions, 1):
        number, metrics = trained[step - 1]
        # the source had seen the steps up to the version that sampled, and none after it
        assert number == metrics["step"] == step
        assert (metrics["version"], metrics["observed"]) == (version, sum(range(version + 1)))
