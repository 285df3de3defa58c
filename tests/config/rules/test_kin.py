"""Rules about the methods that reshape advantages: what each of them requires."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "recipes" / "policy"


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected", "remedy"),
    [
        (
            "hapo",
            ["control=[]"],
            "loss.policy hapo reads what the control hapo computes",
            "add hapo to control",
        ),
        (
            "hapo",
            ["loss.policy=clip"],
            "control.0 hapo is made for loss.policy hapo",
            "set loss.policy to hapo",
        ),
        (
            "copo",
            ["control=[]"],
            "loss.policy copo reads what the control copo computes",
            "add copo to control",
        ),
        (
            "copo",
            ["reward.functions=[{name: format, tags: [a]}]"],
            "compares the completions' answers",
            "add one of choice, empo, empo_model, exact",
        ),
        ("grao", ["rollout.extra_samples=[]"], "answer source", "add answer to rollout.extra_samples"),
        (
            "grao",
            ["loss.policy=clip"],
            "the paper's objective under loss.policy reinforce only",
            "set loss.policy to reinforce",
        ),
        (
            "grao",
            ["loss.aggregate=token_mean"],
            "under loss.aggregate seq_mean_token_mean only",
            "set loss.aggregate to seq_mean_token_mean",
        ),
        ("aapo", ["rollout.extra_samples=[]"], "reference source", "add reference to rollout.extra_samples"),
        (
            "grpo_s",
            ["loss.aggregate=token_mean"],
            "one ratio per sequence",
            "set loss.aggregate to seq_mean_token_mean",
        ),
        (
            "empg",
            ["loss.policy=gspo", "loss.aggregate=seq_mean_token_mean"],
            "one ratio per sequence",
            "drop control.0",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_remedy(
    recipe: str, overrides: list[str], expected: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as error:
        check(load_recipe(RECIPES / f"{recipe}.yaml", overrides=overrides))
    assert expected in str(error.value)
    assert remedy in str(error.value)
