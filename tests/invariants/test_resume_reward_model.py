"""A reward model with a scalar head: its run resumes exactly, and its folder is one for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.learner.reward_model import rewards_of
from rltrain.train import offline
from rltrain.types.policy import TokenRows
from support.resumed_runs import differing, killed_in, lines

RECIPES = Path(__file__).parents[2] / "recipes" / "process_reward"
HEADS = ("bradley_terry", "bradley_terry_margin", "bradley_terry_mmpo", "bradley_terry_soft", "orm")
SETTINGS = (
    "train.steps=4",
    "train.examples=8",
    "eval.examples=8",
    "checkpoint.every=2",
    "learner.optimizer.lr=1e-3",
    "data.max_examples=40",
)


@pytest.mark.parametrize(
    "name", ["bradley_terry", *(pytest.param(name, marks=pytest.mark.slow) for name in HEADS[1:])]
)
def test_a_resumed_run_is_the_uninterrupted_run(name: str, random_model: str, tmp_path: Path) -> None:
    overrides = [f"model.path={random_model}", *SETTINGS]
    recipe = check(load_recipe(RECIPES / f"{name}.yaml", profile="tiny_cpu", overrides=overrides)).recipe
    uninterrupted = tmp_path / "whole"
    resumed = tmp_path / "resumed"
    assert train_command(recipe, uninterrupted, []) == 0
    killed_in(3, offline, "report_step", lambda: train_command(recipe, resumed, []))
    assert train_command(recipe, resumed, []) == 0
    assert lines(uninterrupted) == lines(resumed)
    assert not differing(uninterrupted, resumed, "model/model.safetensors")
    assert "score.weight" in load_file(uninterrupted / "model/model.safetensors")

    rows = TokenRows(((5, 6), (5, 7, 8)), ((9, 2), (10, 11, 2)))
    model: Any = AutoModelForSequenceClassification.from_pretrained(uninterrupted / "model")
    expected = [
        model(torch.tensor([p + c])).logits.item()
        for p, c in zip(rows.prompts, rows.completions, strict=True)
    ]
    assert rewards_of(str(uninterrupted / "model"), rows, tokens_per_micro_batch=64) == pytest.approx(
        expected, abs=1e-5
    )
