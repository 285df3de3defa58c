"""Rules about adapters: what neither engine would load is refused before a model is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("policy/grpo", ["model.adapter={dora: true}"], "vLLM does not serve DoRA.*leave dora out"),
        ("policy/grpo", ["model.adapter={bias: all}"], "no trained biases"),
        ("policy/grpo", ["model.adapter={modules_to_save: [lm_head]}"], "trained in full"),
        ("policy/grpo", ["model.adapter={init: pissa}"], "PiSSA, OLoRA, CorDA, LoftQ"),
        ("policy/grpo", ["model.adapter={dropout: 0.1}"], "differ at random.*leave it at 0"),
        ("policy/grpo", ["model.adapter={rank: 513}"], "less than or equal to 512"),
        (
            "preference/dpo",
            ["model.adapter={quantize: nf4, export: merged}"],
            "set export to adapter",
        ),
        (
            "policy/grpo",
            ["model.adapter={}", "rollout.engine=vllm_server", "rollout.server.tensor_parallel=2"],
            r"rollout\.server\.tensor_parallel is 2.*set it to 1",
        ),
        (
            "policy/grpo",
            [
                "model.adapter={quantize: nf4}",
                "rollout.engine=vllm_server",
                "rollout.server.url=http://localhost:1",
            ],
            r"rollout\.server\.url is set and model\.adapter\.quantize is nf4.*leave rollout\.server\.url",
        ),
        (
            "policy/grpo",
            ["model.adapter={quantize: nf4}", "rollout.engine=vllm_server", "rollout.workers={count: 2}"],
            r"rollout\.workers is set and model\.adapter\.quantize is nf4",
        ),
        (
            "policy/grpo",
            ["model.adapter={}", "rollout.engine=vllm", "rollout.vllm.tensor_parallel=2"],
            "tensor_parallel is 2.*set it to 1",
        ),
        (
            "preference/dpo",
            ["model.adapter={quantize: nf4}", "learner.offload=all"],
            "quantised weights stay on the device",
        ),
        ("process_reward/bradley_terry", ["model.adapter={rank: 8}"], "new scalar head"),
    ],
)
def test_what_is_refused(recipe: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){expected}"):
        check(load_recipe(RECIPES / f"{recipe}.yaml", profile="tiny_cpu", overrides=overrides))


def test_an_adapter_is_not_stacked_on_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    with pytest.raises(RecipeError, match="merge it first"):
        overrides = [f"model.path={tmp_path}", "model.adapter={rank: 8}"]
        check(load_recipe(RECIPES / "policy/grpo.yaml", profile="tiny_cpu", overrides=overrides))


@pytest.mark.parametrize(
    ("rate", "expected"),
    [("1e-6", "belongs to full training"), ("1e-4", ""), ("1e-2", "above what adapters")],
)
def test_learning_rates_of_the_other_kind_of_training_are_warned_of(rate: str, expected: str) -> None:
    overrides = ["model.adapter={rank: 8}", f"learner.optimizer.lr={rate}"]
    checked = check(load_recipe(RECIPES / "policy/grpo.yaml", profile="tiny_cpu", overrides=overrides))
    text = " ".join(warning for warning in checked.warnings if "learner.optimizer.lr" in warning)
    assert expected in text if expected else not text


@pytest.mark.parametrize(("rank", "expected"), [(6, "padded to 8"), (8, "")])
def test_a_rank_that_vllm_pads_is_told(rank: int, expected: str) -> None:
    overrides = [f"model.adapter={{rank: {rank}}}", "learner.optimizer.lr=1e-4", "rollout.engine=vllm"]
    checked = check(load_recipe(RECIPES / "policy/grpo.yaml", profile="tiny_cpu", overrides=overrides))
    text = " ".join(warning for warning in checked.warnings if "model.adapter.rank" in warning)
    assert expected in text if expected else not text


def test_layers_are_named_in_a_list() -> None:
    overrides = ["model.adapter={targets: [q_proj, v_proj]}", "learner.optimizer.lr=1e-4"]
    recipe = check(load_recipe(RECIPES / "policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)).recipe
    assert recipe.model.adapter is not None and recipe.model.adapter.targets == ("q_proj", "v_proj")
