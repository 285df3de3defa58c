"""The card states facts of the recipe and the run, and nothing else."""

import pytest
import yaml

from rltrain.checkpoint.model_card import Published, model_card
from rltrain.config.schema import OnlineRecipe

RECIPE = {
    "about": {"arxiv": "2402.03300", "title": "DeepSeekMath"},
    "seed": 3,
    "model": {"path": "Qwen/Qwen2.5-0.5B"},
    "data": {"train": "openai/gsm8k"},
    "rollout": {"prompts": 24, "n": 8, "max_tokens": 64},
    "reward": {"functions": ["math_answer", {"name": "length", "weight": 0.5}]},
    "advantage": "group",
    "loss": {"policy": {"name": "clip", "eps_high": 0.28}, "terms": [{"name": "kl", "coefficient": 0.001}]},
    "learner": {"optimizer": {"lr": 1e-6}},
    "train": {"steps": 200},
}
METRICS = {
    "eval/pass@1 (before)": 0.39, "eval/pass@1_low (before)": 0.36, "eval/pass@1_high (before)": 0.42,
    "eval/pass@1": 0.77, "eval/pass@1_low": 0.74, "eval/pass@1_high": 0.8, "eval/tokens": 4.0,
}  # fmt: skip


def recipe(**changes) -> dict:
    return OnlineRecipe.model_validate(RECIPE | changes).model_dump()


def header(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_the_header_is_what_the_hub_reads():
    facts = header(model_card(recipe(), METRICS, 200))
    (results,) = facts.pop("model-index")[0]["results"]
    assert results["dataset"] == {"name": "openai/gsm8k", "type": "openai/gsm8k", "split": "test"}
    assert results["metrics"] == [
        {"type": "pass@1", "value": 0.77, "name": "pass@1, 95 % interval 0.74 to 0.8, before training 0.39"},
        {"type": "tokens", "value": 4.0, "name": "tokens"},
    ]
    assert facts == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rltrain", "group+clip"],
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "finetune",
        "datasets": ["openai/gsm8k"],
    }


@pytest.mark.parametrize("path", ["runs/model", "/absolute/model"])
def test_a_local_model_or_data_set_is_not_called_a_hub_one(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    fields = header(model_card(recipe(model={"path": path}, data={"train": "arithmetic"}), {}, 200))
    assert "base_model" not in fields and "datasets" not in fields


def test_settings_are_the_recipes():
    card = model_card(recipe(), METRICS, 150)
    for line in (
        "| steps | 150 of 200 |",
        "| prompts x completions per step | 24 x 8 |",
        "| rewards | math_answer x 1, length x 0.5 |",
        "| policy loss | clip(eps_high=0.28) |",
        "| loss terms | kl(coefficient=0.001) |",
        "| learning rate | 1e-06 (constant, 0 warm-up updates) |",
        "| seed | 3 |",
    ):
        assert line in card.splitlines()
    assert "https://arxiv.org/abs/2402.03300" in card
    assert "controls" not in card  # the recipe has none


def test_results_carry_their_intervals():
    lines = model_card(recipe(), METRICS, 200).splitlines()
    assert "| eval/pass@1 (before) | 0.39 | 0.36 to 0.42 |" in lines
    assert "| eval/pass@1 | 0.77 | 0.74 to 0.8 |" in lines
    assert "| eval/tokens | 4 |  |" in lines
    assert not any("_low" in line for line in lines)


def test_the_license_of_the_base_and_the_kind_of_model_are_in_the_header():
    published = Published("ann/m", {"commit": "abc"}, "seed: 3\n", license="apache-2.0", adapter=True)
    card = model_card(recipe(), METRICS, 200, published)
    facts = header(card)
    assert (facts["license"], facts["library_name"]) == ("apache-2.0", "peft")
    assert facts["base_model_relation"] == "adapter"
    assert (
        "commit abc" in card and "vllm serve Qwen/Qwen2.5-0.5B --enable-lora --lora-modules m=ann/m" in card
    )


def test_without_an_evaluation_there_are_no_results():
    card = model_card(recipe(about={}), {}, 200)
    assert "Results" not in card and "model-index" not in card and "arxiv" not in card and "None" not in card
