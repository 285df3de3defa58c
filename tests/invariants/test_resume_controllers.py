"""State that a run derives from its numbers survives a stop: coefficients, EPO's history, GAIN-RL's window,
the law.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import UserError
from rltrain.report import law
from rltrain.train import online
from support.resumed_runs import SEVENS, differing, killed_in, lines

ROOT = Path(__file__).parents[2]
TERMS = (
    "{name: entropy, coefficient: {name: target_entropy, target: 9.0, step: 0.01}}",
    "{name: kl, coefficient: {name: kl_target, every: 1, decay: 0.5, target: 1.0e-3}}",
    "{name: epo, kappa_low: 0.9, kappa_high: 1.1, coefficient: {name: epo_schedule, value: 0.01}}",
    "{name: clamped_entropy, coefficient: {name: entropy_band, entropy_low: 8.0, entropy_high: 9.0, rate: "
    "0.01}}",
    "{name: rapo, coefficient: {name: annealed, start: 0.05, slope: 0.01}}",
)
SETTINGS = (
    "train.steps=6",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "data.max_prompts=40",
    "rollout.prompts=4",
    "rollout.n=4",
    "data.order={name: gain_rl, sigma: 6.0, stride: 5.0}",
    f"loss.terms=[{', '.join(TERMS)}]",
    "eval.every=3",
    "eval.prompts=4",
    "eval.n=2",
    "eval.k=[1]",
    "learner.updates=2",
    "learner.optimizer.lr=2e-3",
    "reward.workers=1",
)


@pytest.fixture
def start(random_model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(law, "MIN_POINTS", 2)

    def call(folder: Path, *overrides: str) -> int:
        settings = [f"model.path={random_model}", f"reward.functions=['{SEVENS}']", *SETTINGS, *overrides]
        recipe = check(
            load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=settings)
        ).recipe
        return train_command(recipe, folder, [])  # type: ignore[arg-type]

    return call


def state(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"checkpoints/step-{step}/training/state.json").read_text())


@pytest.mark.slow
def test_controllers_order_and_law_go_on_as_if_never_stopped(start: Any, tmp_path: Path) -> None:
    uninterrupted = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    assert start(uninterrupted) == 0
    killed_in(5, online, "apply_methods", lambda: start(stopped))
    assert start(stopped) == 0

    assert lines(stopped) == lines(uninterrupted)
    assert not differing(
        uninterrupted, stopped, "model/model.safetensors", "checkpoints/step-6/training/optimizer.safetensors"
    )
    for key in ("controllers", "order", "law"):
        assert state(stopped, 6)[key] == state(uninterrupted, 6)[key]

    # and all of it has moved, so that forgetting any of it would show
    steps = [line for line in lines(uninterrupted) if "loss/total" in line]
    names = ("entropy", "kl", "clamped_entropy", "rapo")
    assert all(len({line[f"loss/{name}_coefficient"] for line in steps}) >= 4 for name in names)
    assert len({line["loss/epo_history"] for line in steps[1:]}) == 5 and "loss/epo_history" not in steps[0]
    assert state(uninterrupted, 6)["order"]["centre"] > state(uninterrupted, 3)["order"]["centre"] > 0
    assert "law/ceiling" in steps[-1] and len(state(uninterrupted, 6)["law"]["points"]["eval"]) == 2
    assert [line["loss/rapo_coefficient"] for line in steps[:3]] == pytest.approx([0.05, 0.04, 0.03])


def test_a_run_with_a_schedule_is_not_made_longer(start: Any, tmp_path: Path) -> None:
    terms = "loss.terms=[{name: epo, coefficient: {name: epo_schedule, value: 0.01}}]"
    short = ("data.order=shuffled", terms, "eval.every=0", "data.eval=null", "checkpoint.every=1")
    assert start(tmp_path / "run", "train.steps=1", *short) == 0
    with pytest.raises(UserError, match=r"had an epo_schedule that ends at 1, and train\.steps is 2"):
        start(tmp_path / "run", "train.steps=2", *short)
