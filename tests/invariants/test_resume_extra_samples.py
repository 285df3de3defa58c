"""A run with rows of other sources resumes exactly: AEPO restores its entropy, AAPO its reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.checkpoint.run_state import read_verified
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.train import online
from support.resumed_runs import differing, killed_in, lines

POLICY = Path(__file__).parents[2] / "recipes" / "policy"
REWARD = """
from rltrain.reward.score import Score

def low_digits(inputs):
    shares = [sum(c in "01234" for c in text) / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.1)}) for share in shares]
"""
SETTINGS = (
    *(
        "train.steps=5",
        "checkpoint.every=2",
        "learner.optimizer.lr=1e-3",
        "rollout.prompts=8",
        "rollout.n=4",
        "reward.workers=1",
    ),
    *("eval.prompts=4", "eval.n=2", "eval.k=[1]", "eval.at_start=false", "data.max_prompts=26"),
)
AAPO = ("advantage=aapo", "loss.policy=reinforce", "loss.terms=[]", "rollout.extra_samples=[reference]")


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        pytest.param("aepo", ("learner.updates=2",), id="aepo"),
        pytest.param("aepo_released", ("learner.updates=2",), id="aepo as released", marks=pytest.mark.slow),
        pytest.param("grpo", AAPO, id="aapo", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    recipe: str, overrides: tuple[str, ...], random_model: str, tmp_path: Path
) -> None:
    reward = tmp_path / "low_digits.py"
    reward.write_text(REWARD)
    settings = [
        f"model.path={random_model}",
        f"reward.functions=['{reward}:low_digits']",
        *SETTINGS,
        *overrides,
    ]
    loaded = check(load_recipe(POLICY / f"{recipe}.yaml", profile="tiny_cpu", overrides=settings)).recipe
    assert isinstance(loaded, OnlineRecipe)
    uninterrupted = tmp_path / "whole"
    resumed = tmp_path / "resumed"
    assert train_command(loaded, uninterrupted, []) == 0
    killed_in(3, online, "apply_methods", lambda: train_command(loaded, resumed, []))
    assert train_command(loaded, resumed, []) == 0
    # a step whose samples were kept pushes no reference, so that another push compares every weight
    counted = [
        [{name: value for name, value in line.items() if name != "sync/checked"} for line in lines(run)]
        for run in (uninterrupted, resumed)
    ]
    assert counted[0] == counted[1]
    assert not differing(uninterrupted, resumed, "model/model.safetensors")
    state = read_verified(uninterrupted / "checkpoints" / "step-4")
    if recipe != "grpo":
        entropy = next(line["learner/entropy_mean"] for line in lines(uninterrupted) if line["step"] == 4)
        assert state.sources == [{"entropy": entropy}]
        # lost at the stop, it would have been 1.2 again in the third step
        assert [
            line["control/aepo_temperature"] for line in lines(resumed) if "reward/mean" in line
        ] == pytest.approx([1.2] + [0.8] * 4)
