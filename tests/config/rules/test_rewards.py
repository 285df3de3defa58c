"""Rewards that run programs or query servers: the settings that a recipe must contain."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.config.rules import check
from rltrain.errors import RecipeError

GRPO = Path(__file__).parents[3] / "recipes" / "policy" / "grpo.yaml"


def problems(*overrides: str) -> str:
    try:
        check(load_recipe(GRPO, overrides=overrides))
    except RecipeError as error:
        return "\n".join(error.problems)
    return ""


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (
            "{name: code_tests, seconds: 10}",
            "seconds is 10, but its process is ended after reward.seconds 10",
        ),
        (
            "{name: code_io, total_seconds: 12}",
            "total_seconds is 12, but its process is ended after reward.seconds 10",
        ),
        ("{name: code_tests, secnds: 3}", "no hyperparameter 'secnds'; did you mean 'seconds'?"),
        (
            "{name: code_tests, extract: fence}",
            "extract must be Literal['auto', 'fenced', 'continuation'], got 'fence'",
        ),
        ("reward_model", "reward_model: path is empty"),
        ("reward_model_http", "url must be the address of a server"),
        ("{name: reward_model_http, url: 'http://me:hush@host/x'}", "the url holds a password"),
        ("{name: llm_judge, url: 'http://127.0.0.1:8000/v1'}", "model is empty"),
        (
            "{name: llm_judge, url: 'http://127.0.0.1:8000/v1', model: j}",
            "seconds is 60, but its process is ended after reward.seconds 10",
        ),
        (
            "{name: llm_judge, url: 'http://h/v1', model: j, seconds: 5, low: 3, high: 3}",
            "high 3 must be above low 3",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(reward: str, expected: str):
    assert expected in problems(f"reward.functions=[{reward}]")


def test_a_judge_of_pairs_needs_two_completions():
    judge = "reward.functions=[{name: llm_judge_pairs, url: 'http://h/v1', model: j, seconds: 5}]"
    assert problems(judge) == ""
    assert "llm_judge_pairs: it compares completions of one prompt and rollout.n is 1" in problems(
        judge, "rollout.n=1"
    )


def test_programs_with_dynamic_sampling_report_correctness():
    assert problems("reward.functions=[code_tests]", "rollout.dynamic_sampling={}") == ""


def test_a_token_is_named_and_never_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RM_TOKEN", "hush-hush")
    reward = "reward.functions=[{name: reward_model_http, url: 'http://h/x', token_env: RM_TOKEN}]"
    resolved = resolved_yaml(check(load_recipe(GRPO, overrides=(reward,))).recipe)
    assert "RM_TOKEN" in resolved and "hush" not in resolved
