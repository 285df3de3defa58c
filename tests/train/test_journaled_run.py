"""Rollouts are on the disk before they are trained on, and a run that was killed goes on with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rltrain.checkpoint import run_state
from rltrain.checkpoint.journal import Journal
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.rollout.colocated import ColocatedRollouts
from rltrain.train import online
from support.resumed_runs import assert_same_run, at_call, killed_in, lines, train_here


@pytest.fixture(scope="module")
def start(random_model: str) -> Callable[..., int]:
    return functools.partial(train_here, random_model)


@pytest.fixture(scope="module")
def uninterrupted(start: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("journal") / "whole"
    assert start(folder) == 0
    return folder


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps that an engine samples, in order."""
    steps: list[int] = []
    take = ColocatedRollouts.take

    def counted(self: ColocatedRollouts, step: int, version: int) -> Any:
        steps.append(step)
        return take(self, step, version)

    monkeypatch.setattr(ColocatedRollouts, "take", counted)
    yield steps


def test_what_was_sampled_before_a_kill_is_kept(
    start: Any, uninterrupted: Path, sampled: list[int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed_in(6, online, "apply_methods", lambda: start(run))
    assert sampled == [1, 2, 3, 4, 5, 6]
    assert Journal(RunFolder(run)).steps() == [1, 2, 3, 4, 5, 6]  # the step in hand is written already
    assert start(run) == 0
    assert sampled == [1, 2, 3, 4, 5, 6]  # the checkpoint is that of step 3
    assert_same_run(uninterrupted, run)


def test_an_evaluation_that_is_there_is_not_sampled_again(
    start: Any, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run ends after the evaluation at step 3, before the checkpoint of that step."""
    evaluated: list[int] = []
    evaluate = ColocatedRollouts.evaluate

    def counted(self: ColocatedRollouts, prompts: Any, sampling: Any, version: int, *more: Any) -> Any:
        evaluated.append(version)
        return evaluate(self, prompts, sampling, version, *more)

    monkeypatch.setattr(ColocatedRollouts, "evaluate", counted)
    run = tmp_path / "run"
    killed_in(1, run_state, "write_plain_state", lambda: start(run))
    assert evaluated == [0, 6] == Journal(RunFolder(run)).evaluated_versions()
    assert start(run) == 0
    assert evaluated == [0, 6, 12]
    assert_same_run(uninterrupted, run)


def test_a_damaged_file_is_sampled_again_and_so_is_all_of_a_run_that_keeps_nothing(
    start: Any, uninterrupted: Path, sampled: list[int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed_in(5, online, "apply_methods", lambda: start(run))
    path = Journal(RunFolder(run)).path(4)
    path.write_bytes(path.read_bytes()[:-40])
    assert start(run) == 0
    assert sampled == [1, 2, 3, 4, 5, 4, 6]
    assert_same_run(uninterrupted, run)
    groups = [Journal(RunFolder(folder)).read(4).groups for folder in (run, uninterrupted)]
    assert groups[0] == groups[1]

    sampled.clear()
    run = tmp_path / "without"
    killed_in(5, online, "apply_methods", lambda: start(run, "journal.keep=nothing"))
    assert not (run / "rollouts").exists()
    assert start(run, "journal.keep=nothing") == 0
    assert sampled == [1, 2, 3, 4, 5, 4, 5, 6]
    assert lines(run) == lines(uninterrupted)


def test_samples_of_other_weights_are_not_kept(
    start: Any, uninterrupted: Path, sampled: list[int], tmp_path: Path
) -> None:
    """Files of another run in the folder: same steps, same recipe, other weights."""
    run = tmp_path / "run"
    killed_in(2, online, "apply_methods", lambda: start(run))
    other = tmp_path / "other"
    assert start(other, "learner.optimizer.lr=1e-3", "train.steps=3") == 0
    sampled.clear()
    for step in (2, 3):
        Journal(RunFolder(run)).path(step).write_bytes(Journal(RunFolder(other)).path(step).read_bytes())
    assert start(run) == 0
    assert sampled == [2, 3, 4, 5, 6]
    assert_same_run(uninterrupted, run)


def test_only_files_that_a_checkpoint_needs_stay(start: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    files: list[list[int]] = []
    with at_call(6, online, "apply_methods", lambda: files.append(Journal(RunFolder(run)).steps())):
        assert start(run, "journal.keep=resume", "checkpoint.every=2", "checkpoint.keep=1") == 0
    assert files == [[5, 6]]  # the checkpoint that is left is that of step 4
    assert not Journal(RunFolder(run)).evaluated_versions()
