"""An attention kernel that the architecture lacks is told by ``validate``; what is told agrees with
transformers' classes.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedModel

from rltrain.build.local_inputs import require_local_inputs
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.rules.attention import _FLAGS, lacks_kernel
from rltrain.errors import RecipeError, UserError

ROOT = Path(__file__).parents[3]
KINDS = (
    "bloom", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite",
    "llama", "mamba", "mimo_v2_flash", "mistral", "mixtral", "olmoe", "opt", "phi3", "qwen2", "qwen3_moe",
)  # fmt: skip


def checked(model: Path, attention: str) -> None:
    recipe = ROOT / "recipes/policy/grpo.yaml"
    overrides = [f"model.path={model}", f"model.attention={attention}"]
    check(load_recipe(recipe, profile="tiny_cpu", overrides=overrides))


def test_a_kernel_that_the_architecture_lacks_is_told_by_validate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    for attention in ("auto", "eager", "flash_attention_2"):
        checked(tmp_path, attention)
    with pytest.raises(RecipeError, match=r"is sdpa, .* no such kernel for .* \(gpt_oss\); set"):
        checked(tmp_path, "sdpa")


@pytest.mark.parametrize("facts", [{}, [], {"model_type": 3}, {"model_type": "../x"}, {"model_type": "own"}])
def test_nothing_is_told_of_a_model_that_is_not_known(tmp_path: Path, facts: object) -> None:
    checked(tmp_path / "absent", "sdpa")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    checked(tmp_path, "sdpa")


def test_a_model_with_its_own_code_may_have_any_kernel(tmp_path: Path) -> None:
    facts = {"model_type": "gpt_oss", "auto_map": {"AutoModelForCausalLM": "m.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    checked(tmp_path, "sdpa")


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_and_the_class_agree(kind: str) -> None:
    name = type(AutoConfig.for_model(kind)).__module__.replace("configuration_", "modeling_")
    module = importlib.import_module(name)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value is not PreTrainedModel
    ]
    for attention, flag in _FLAGS.items():
        assert lacks_kernel(kind, attention) == (not any(getattr(each, flag) for each in classes)), attention


def test_flash_attention_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"model.path={tmp_path}", "model.attention=flash_attention_2"]
    recipe = load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)
    monkeypatch.setattr("rltrain.build.local_inputs.find_spec", lambda name: None)
    with pytest.raises(UserError, match="neither the package flash-attn nor kernels is installed here"):
        require_local_inputs(recipe)
