"""A run with a process reward model resumes exactly, with both models and both optimizers; ranks agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rltrain.checkpoint.run_state import read_state
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.train import online
from support.launch import run_ranks
from support.resumed_runs import assert_equal_tensors, differing, killed_in, lines
from support.warm import run_program

ROOT = Path(__file__).parents[2]
PRIME = ROOT / "recipes/policy/prime.yaml"
REWARD = """
from rltrain.reward.score import Score

def digits(inputs):
    shares = [sum(c in "0123456789" for c in text) / max(len(text), 1) for text in inputs.completions]
    return [Score(float(share > 0.1), {"correct": float(share > 0.1)}) for share in shares]
"""
SETTINGS = (
    *(
        "train.steps=4",
        "checkpoint.every=2",
        "learner.optimizer.lr=1e-3",
        "rollout.prompts=8",
        "rollout.n=4",
        "reward.workers=1",
    ),
    *(
        "eval.prompts=4",
        "eval.n=2",
        "eval.k=[1]",
        "eval.at_start=false",
        "data.max_prompts=26",
        "learner.updates=2",
    ),
    *(
        "process_reward.updates=2",
        "process_reward.optimizer.lr=2e-3",
        "process_reward.optimizer.schedule=cosine",
    ),
)


def settings(model: str, folder: Path) -> list[str]:
    reward = folder / "digits.py"
    reward.write_text(REWARD)
    return [f"model.path={model}", f"reward.functions=['{reward}:digits']", *SETTINGS]


@pytest.mark.parametrize(
    ("update", "form"), [("after", "whole"), pytest.param("before", "sharded", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_uninterrupted_run(
    update: str, form: str, random_model: str, tmp_path: Path
) -> None:
    overrides = [
        *settings(random_model, tmp_path),
        f"process_reward.update={update}",
        f"checkpoint.format={form}",
    ]
    recipe = check(load_recipe(PRIME, profile="tiny_cpu", overrides=overrides)).recipe
    uninterrupted = tmp_path / "whole"
    resumed = tmp_path / "resumed"
    assert train_command(recipe, uninterrupted, []) == 0
    # the reward model has taken its third step, the policy not
    killed_in(3, online, "apply_methods", lambda: train_command(recipe, resumed, []))
    assert train_command(recipe, resumed, []) == 0
    assert lines(uninterrupted) == lines(resumed)
    names = ("model/model.safetensors", "model/process_reward/model.safetensors")
    assert not differing(uninterrupted, resumed, *names)
    saved = [read_state(run / "checkpoints/step-4").tensors for run in (uninterrupted, resumed)]
    assert_equal_tensors(*saved)
    taught = [line["process_reward/abs"] for line in lines(uninterrupted) if "process_reward/abs" in line]
    assert len(taught) == 4 and min(taught) > 0.01  # nats: it says something from the first step on
    start = load_file(Path(random_model) / "model.safetensors")
    end = load_file(uninterrupted / "model/process_reward/model.safetensors")
    assert any(not torch.equal(start[key], end[key]) for key in start)
    AutoModelForCausalLM.from_pretrained(uninterrupted / "model" / "process_reward")  # an ordinary folder


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_take_the_steps_that_one_takes(backend: str, random_model: str, tmp_path: Path) -> None:
    overrides = [
        word
        for setting in [*settings(random_model, tmp_path), "learner.precision=float32"]
        for word in ("--set", setting)
    ]
    reports = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        command = [
            "-m",
            "rltrain",
            "train",
            str(PRIME),
            "--profile",
            "tiny_cpu",
            "--run",
            str(folder),
            *overrides,
        ]
        if ranks == 2:
            run_ranks(backend, command)
        else:
            done = run_program(command)
            assert done.returncode == 0, done.stderr[-3000:]
        reports.append(lines(folder))
    setting, two = reports
    for name in (
        "process_reward/loss",
        "process_reward/abs",
        "process_reward/grad_norm",
        "reward/mean",
        "learner/grad_norm",
    ):
        first, second = ([line[name] for line in lines if name in line] for lines in (setting, two))
        assert len(first) == 4
        assert second == pytest.approx(first, rel=2e-3, abs=1e-5), name
