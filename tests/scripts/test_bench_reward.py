"""Reward against wall-clock: what the record and the figure say of the steps of both trainers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from support.scripts import SCRIPTS


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_reward")


def steps(count: int) -> list[dict[str, float]]:
    return [{"seconds": 2.0 * step, "reward": float(step), "peak": 2.0**30} for step in range(1, count + 1)]


def test_the_final_reward_is_of_the_last_ten_steps(bench: Any) -> None:
    assert bench.summary(steps(20)) == {"steps": 20, "seconds": 40.0, "last_reward": 15.5, "peak_gib": 1.0}
    assert bench.summary(steps(3))["last_reward"] == 2.0


def test_a_trainer_s_time_ends_with_the_step_that_passes_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, float]] = []

    class Turns:
        def say(self, record: dict[str, float]) -> None:
            said.append(record)

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        assert code == 0
        raise Ended

    times = iter([100.0, 104.0, 111.0])
    monkeypatch.setattr(bench, "perf_counter", lambda: next(times))
    monkeypatch.setattr(bench.os, "_exit", end)
    clock = bench.Clock(Turns(), 10.0)
    clock.step(0.25)
    with pytest.raises(Ended):
        clock.step(0.5)
    assert [(each["seconds"], each["reward"]) for each in said] == [(4.0, 0.25), (11.0, 0.5)]


def test_the_figure_is_a_png(bench: Any, tmp_path: Path) -> None:
    bench.draw(tmp_path / "reward.png", {"rltrain": steps(4), "trl": steps(2)})
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
