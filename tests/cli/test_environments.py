"""``rltrain eval`` and ``rltrain generate`` in an environment: whole episodes, and one clear line
where it cannot be had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.cli.evaluate import eval_command, generate_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import UserError

ROOT = Path(__file__).parents[2]
MINE = ROOT / "tests/support/environments.py"
SIZES = ("eval.prompts=3", "eval.n=2", "eval.k=[1]", "reward.workers=1")


def recipe(model: str, name: str, **options: Any) -> Any:
    environment = {"name": name, "max_turns": 3, "turn_tokens": 5, "workers": 1, **options}
    settings = (f"model.path={model}", f"rollout.environment={json.dumps(environment)}", *SIZES)
    return check(
        load_recipe(ROOT / "recipes/policy/empg_calculator.yaml", profile="tiny_cpu", overrides=settings)
    ).recipe


def test_eval_grades_the_last_turn_of_each_episode(random_model: str, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    assert eval_command(random_model, recipe(random_model, f"{MINE}:Counting", turns=2), out) == 0
    metrics = json.loads(out.read_text())
    assert metrics["eval/ungraded"] == 0
    assert 6 < metrics["eval/tokens"] <= 48  # two turns and the environment's text between them


def test_generate_shows_whole_episodes(random_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_command(recipe(random_model, "calculator"), ["12*7=", "1+1="], n=2, temperature=1.0) == 0
    shown = capsys.readouterr().out
    assert shown.index("12*7=") < shown.index("1+1=") and len(shown.splitlines()) >= 6


def test_an_environment_that_does_not_work_is_found_before_any_weight_is_loaded(random_model: str) -> None:
    with pytest.raises(UserError, match=r"Unmakeable.*no display"):
        eval_command(random_model, recipe(random_model, f"{MINE}:UnmakeableEnvironment"), None)


def test_a_task_that_an_environment_refuses_is_named(random_model: str) -> None:
    pytest.importorskip("textworld", reason="textworld is not installed (pip install rltrain[textworld])")
    with pytest.raises(UserError, match=r"textworld fails on the first task.*data.train to textworld"):
        eval_command(random_model, recipe(random_model, "textworld"), None)
