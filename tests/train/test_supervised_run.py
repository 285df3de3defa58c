"""A run on conversations, from the file to the model, stopped and continued."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check

ROOT = Path(__file__).parents[2]


def write_talks(path: Path, start: int, count: int) -> Path:
    """Two sums a conversation."""
    roles = ("user", "assistant") * 2
    talks = []
    for number in range(start, start + count):
        first, second = number % 9, number // 9 % 9
        texts = (f"{first}+{start}=", str(first + start), f"{second}+{first}=", str(first + second))
        talks.append([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    return path


def train(folder: Path, overrides: list[str], resume: str = "never") -> list[dict[str, float]]:
    recipe = load_recipe(ROOT / "recipes/supervised/sft.yaml", profile="tiny_cpu", overrides=overrides)
    assert train_command(check(recipe).recipe, folder, [], resume) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_conversations_lower_the_held_out_loss_and_a_resumed_run_is_the_same(
    random_model: str, tmp_path: Path
) -> None:
    overrides = [
        f"model.path={random_model}",
        f"data.train={write_talks(tmp_path / 'train.jsonl', 0, 60)}",
        f"data.eval={write_talks(tmp_path / 'held.jsonl', 60, 20)}",
        "data.max_completion_tokens=24",
        "train.examples=8",
        "train.steps=8",
        "learner.optimizer.lr=3e-3",
        "checkpoint.every=4",
        "eval.examples=8",
    ]
    lines = train(tmp_path / "run", overrides)
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < losses[0] - 0.5
    train(tmp_path / "again", overrides, str(tmp_path / "run/checkpoints/step-4"))
    models = [load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "again")]
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())
