"""Lengths are compared with the model's positions where its config.json is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.model_config import config_path, model_context
from rltrain.config.plan import plan
from support.checking import refused, warnings

ROOT = Path(__file__).parents[2]
LONG_ROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


def write_config(folder: Path, **facts: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **facts}))
    return str(folder)


def test_a_row_longer_than_the_model_is_refused_before_anything_is_loaded(
    recipe: Path, tmp_path: Path
) -> None:
    model = write_config(tmp_path / "model", max_position_embeddings=23)
    (problem,) = refused(recipe, f"model.path={model}")
    assert f"data.max_prompt_tokens 16 + rollout.max_tokens 8 = 24 tokens, but model.path {model}" in problem
    assert "reads at most 23 (its max_position_embeddings); lower one of them" in problem
    write_config(tmp_path / "model", max_position_embeddings=24)
    assert warnings(recipe, f"model.path={model}") == ()


def test_completions_of_a_data_set_and_other_models_count(tmp_path: Path) -> None:
    short = write_config(tmp_path / "short", max_position_embeddings=512)
    dpo = ROOT / "recipes/preference/rpo.yaml"
    (problem,) = refused(dpo, f"model.reference={short}")
    assert "data.max_prompt_tokens 512 + data.max_completion_tokens 512 = 1024 tokens" in problem
    assert f"model.reference {short} reads at most 512" in problem


@pytest.mark.parametrize(
    ("facts", "tokens"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 24,
                "rope_scaling": LONG_ROPE,
            },
            24,
        ),
        ({"n_positions": 64}, None),
    ],
)
def test_the_context_is_the_one_that_training_compares(
    tmp_path: Path, facts: dict[str, Any], tokens: int | None
) -> None:
    context = model_context(write_config(tmp_path, **facts))
    assert (None if context is None else context.tokens) == tokens


def test_a_model_of_the_hub_is_looked_up_in_its_cache(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--lab--model"
    write_config(cache / "snapshots" / "0123abc", max_position_embeddings=20)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    assert config_path("lab/model") == config_path("lab/model", "0123abc")
    (problem,) = refused(recipe, "model.path=lab/model")
    assert "model.path lab/model reads at most 20" in problem
    assert warnings(recipe, "model.path=lab/other") == ()


def test_the_plan_says_what_the_model_reads(recipe: Path, tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", max_position_embeddings=4096)
    name = "model: tokens of a row, at most"
    for path, value in ((model, "4,096"), ("lab/elsewhere", "unknown")):
        lines = {
            line.name: line.value for line in plan(load_recipe(recipe, overrides=[f"model.path={path}"]))
        }
        assert lines[name] == value
