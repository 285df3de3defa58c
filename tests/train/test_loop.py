"""What happens around the steps of a run, in which order; the steps themselves are strings here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rltrain.train.loop import TrainingRun, timing_metrics
from rltrain.train.saving import Stopped


class Measured:
    groups = ()

    def metrics(self) -> dict[str, float]:
        return {"eval/accuracy": 0.5}


def said_by(
    *,
    steps: int,
    done: int = 0,
    evaluate: int = 0,
    save: int = 0,
    at_start: bool = False,
    held_out: bool = True,
    stop_in: int | None = None,
) -> list[str]:
    """Everything a run did, in its order."""
    said: list[str] = []

    def evaluation(step: int, metrics: Mapping[str, float], groups: Any) -> None:
        assert metrics["eval/accuracy"] == 0.5 and metrics["time/eval"] >= 0
        said.append(f"measured {step}")

    def written(kind: str, step: int, scores: Any) -> Path:
        said.append(f"{kind} {step} with {len(scores.all)}")
        return Path(kind)

    class Run(TrainingRun):
        def evaluate(self) -> Any:
            return Measured() if held_out else None

        def close(self) -> None:
            """Nothing is open."""

    run = Run(
        recipe=SimpleNamespace(
            eval=SimpleNamespace(at_start=at_start, every=evaluate),
            train=SimpleNamespace(profile=None),
            checkpoint=SimpleNamespace(every=save),
        ),  # type: ignore[arg-type]
        total_steps=steps,
        learner=SimpleNamespace(rank=0, any_rank=lambda flag: flag),  # type: ignore[arg-type]
        reporter=SimpleNamespace(evaluation=evaluation),  # type: ignore[arg-type]
        writer=SimpleNamespace(  # type: ignore[arg-type]
            checkpoint=lambda step, scores: written("saved", step, scores),
            final=lambda step, scores: written("finished", step, scores),
            wait=lambda: None,
        ),
        resumed=SimpleNamespace(random=(), step=done, evaluations=[{}] * done) if done else None,  # type: ignore[arg-type]
        should_stop=lambda: said[-1] == f"step {stop_in}",
    )
    try:
        for step in run.steps():
            said.append(f"step {step}")
        assert run.finish() == Path("finished")
    except Stopped as stopped:
        assert stopped.checkpoint == Path("saved")
        said.append(str(stopped))
    return said


def test_evaluations_and_checkpoints_come_after_their_step_and_the_last_evaluation_once() -> None:
    events = [
        "measured 0",
        "step 1",
        "step 2",
        "measured 2",
        "saved 2 with 2",
        "step 3",
        "step 4",
        "measured 4",
        "saved 4 with 3",
    ]
    assert said_by(steps=4, evaluate=2, save=2, at_start=True) == [*events, "finished 4 with 3"]
    assert said_by(steps=3, evaluate=2) == [
        "step 1",
        "step 2",
        "measured 2",
        "step 3",
        "measured 3",
        "finished 3 with 2",
    ]


def test_zero_means_never_but_the_finished_model_is_measured() -> None:
    assert said_by(steps=2) == ["step 1", "step 2", "measured 2", "finished 2 with 1"]
    assert said_by(steps=1, held_out=False, at_start=True, evaluate=1) == ["step 1", "finished 1 with 0"]


def test_a_resumed_run_takes_the_steps_that_are_left_with_the_evaluations_it_had() -> None:
    assert said_by(steps=3, done=2, at_start=True) == ["step 3", "measured 3", "finished 3 with 3"]


def test_a_run_that_is_stopped_saves_the_step_in_hand_and_finishes_nothing() -> None:
    assert said_by(steps=3, save=3, stop_in=2) == [
        "step 1",
        "step 2",
        "saved 2 with 0",
        "stopped after step 2",
    ]


def test_rates_are_per_second_of_the_whole_step() -> None:
    metrics = timing_metrics({"rollout": 3.0, "update": 1.0}, tokens=8.0)
    assert metrics == pytest.approx(
        {"time/rollout": 3.0, "time/update": 1.0, "time/step": 4.0, "time/tokens_per_second": 2.0}
    )
