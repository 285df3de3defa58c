"""A run whose trajectory is that of one process, however many ranks and whatever samplers it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
# Every step has a gradient: if it were only rounding noise, AdamW would make steps that differ between
# machines.
REWARD = """
from rltrain.reward.score import Score

def odd(inputs):
    shares = [sum(ord(letter) % 2 for letter in text) / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.5)}) for share in shares]
"""
# Aspects in which backends could differ: several micro-batches on each rank (32 rows of 12 tokens), active
# clipping (the norm is about 3), weight decay on matrices only, two updates per step, a frozen reference,
# momentum and schedule across a checkpoint. AdamW's eps is above the rounding noise of a gradient (about
# 1e-9); otherwise AdamW would turn that noise into steps of the size of the learning rate.
SETTINGS = (
    "train.steps=4",
    "train.deadline_seconds=600",
    "checkpoint.every=2",
    "rollout.prompts=8",
    "rollout.n=4",
    "rollout.mismatch_stop=1e-4",
    "rollout.mismatch_patience=1",
    "learner.updates=2",
    "learner.tokens_per_micro_batch=96",
    "learner.optimizer.lr=5e-4",
    "learner.optimizer.eps=1e-5",
    "learner.optimizer.weight_decay=0.1",
    "learner.optimizer.max_grad_norm=0.5",
    "learner.optimizer.schedule=cosine",
    "data.eval=null",
    "reward.workers=1",
)
COMPARED = ("loss/total", "learner/grad_norm", "learner/entropy_mean", "reward/mean", "rollout/mismatch_abs")


def overrides(model: str, folder: Path) -> list[str]:
    (folder / "odd.py").write_text(REWARD)
    return [f"model.path={model}", f"reward.functions=['{folder / 'odd.py'}:odd']", *SETTINGS]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(run_folder: Path, expected: Path, *, first: int = 0) -> None:
    """Metrics from step ``first`` + 1 on, and the last weights, up to the order of float32 sums."""
    lines = metrics(run_folder)
    expected_lines = metrics(expected)[first:]
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for line, want in zip(lines, expected_lines, strict=True):
        for name in COMPARED:
            assert line[name] == pytest.approx(want[name], rel=1e-4, abs=2e-6), (line["step"], name)
    weights, expected_weights = (load_file(run / "model/model.safetensors") for run in (run_folder, expected))
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert (weight - expected_weights[name]).abs().max() < 2e-5, name  # of 8 updates of up to 5e-4
