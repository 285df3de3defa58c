"""A run whose workers are all gone saves what it has, ends with exit code 75, and the same command goes on to
the weights of a run that lost none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rltrain.protocols import WorkersGone
from rltrain.rollout.colocated import GradedSampler
from rltrain.types.samples import RolloutGroup
from support.resumed_runs import train_here

QUIET = ("train.steps=3", "eval.every=0", "eval.at_start=false", "checkpoint.every=0", "learner.updates=1")


def lose_workers(monkeypatch: pytest.MonkeyPatch, is_due: Callable[[int], bool]) -> None:
    """The engine's call number ``n`` finds no worker where ``is_due(n)``."""
    sample = GradedSampler.sample
    calls = [0]

    def sample_or_fail(self: GradedSampler, *arguments: Any) -> list[RolloutGroup]:
        calls[0] += 1
        if is_due(calls[0]):
            raise WorkersGone("no worker serves: worker 0 is lost: unplugged")
        return sample(self, *arguments)

    monkeypatch.setattr(GradedSampler, "sample", sample_or_fail)


@pytest.mark.slow
def test_the_same_command_goes_on(
    random_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the first step nothing is there to save; in the last one, after prompts were drawn for it."""
    assert train_here(random_model, tmp_path / "whole", *QUIET) == 0
    with monkeypatch.context() as patch:
        lose_workers(patch, lambda number: number in (1, 6))
        assert train_here(random_model, tmp_path / "run", *QUIET) == 75
        assert "no step was taken" in capsys.readouterr().out
        assert train_here(random_model, tmp_path / "run", *QUIET) == 75
    said = capsys.readouterr().out
    assert "worker 0 is lost: unplugged" in said and "continue with: " in said
    assert train_here(random_model, tmp_path / "run", *QUIET) == 0
    expected = load_file(tmp_path / "whole/model/model.safetensors")
    held = load_file(tmp_path / "run/model/model.safetensors")
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)


@pytest.mark.slow
def test_workers_gone_in_an_evaluation(
    random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before it is whole, and is not taken again."""
    settings = ("train.steps=2", "eval.every=2", "eval.at_start=false", "rollout.dynamic_sampling=null")
    with monkeypatch.context() as patch:
        lose_workers(patch, lambda number: number == 3)  # two steps of one round each come before
        assert train_here(random_model, tmp_path / "run", *settings) == 75
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    assert train_here(random_model, tmp_path / "run", *settings) == 0
