"""Derived numbers, compared with calculations by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rltrain.config.capacity.shape import read_shape
from rltrain.config.load import load_recipe
from rltrain.config.plan import plan


def values(path: Path, *overrides: str) -> dict[str, str]:
    return {line.name: line.value for line in plan(load_recipe(path, overrides=overrides))}


def test_the_numbers_of_a_step(recipe: Path) -> None:
    numbers = values(
        recipe, "learner.updates=5", "learner.epochs=2", "learner.tokens_per_micro_batch=100", "eval.every=50"
    )
    assert numbers["rollout: completions per step"] == "192"  # 24 x 8
    assert numbers["rollout: longest row"] == "24"  # 16 + 8
    assert numbers["rollout: tokens per step, at most"] == "1,536"  # 192 x 8
    assert numbers["rollout: prompts drawn in all"] == "4,800"  # 200 x 24
    assert numbers["reward: grading per step, at most"] == "960"  # 192 x 10 s / 2 workers
    assert numbers["learner: updates per step"] == "10"  # 5 x 2
    assert numbers["learner: updates in all"] == "2,000"
    assert numbers["learner: groups per update"] == "4.8"  # 24 / 5
    assert numbers["learner: longest rows per micro-batch"] == "4"  # 100 // 24
    assert numbers["learner: micro-batches per update, at most"] == "10"  # 5 groups x 8 rows / 4
    assert numbers["learner: staleness, at most"] == "9"
    assert numbers["eval: completions"] == "2,048 x 5"  # 256 x 8; before, after, and at steps 50, 100, 150
    assert "rollout: prompts drawn per step, at most" not in numbers
    assert numbers["memory"] == "unknown"


def test_dynamic_sampling_draws_at_most_its_rounds(recipe: Path) -> None:
    assert (
        values(recipe, "rollout.dynamic_sampling.max_rounds=3")["rollout: prompts drawn per step, at most"]
        == "72"
    )


def test_no_held_out_data_is_no_evaluation(recipe: Path) -> None:
    assert values(recipe, "data.eval=null")["eval"] == "none"


def tiny_config(folder: Path, **changes: object) -> Path:
    facts = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    facts |= {"intermediate_size": 16, "vocab_size": 100, "tie_word_embeddings": True}
    path = folder / "config.json"
    path.write_text(json.dumps(facts | changes))
    return path


def test_parameters_and_cache_follow_from_the_config(tmp_path: Path) -> None:
    # Head width 8 / 4 = 2, keys and values 2 x 2 = 4 wide. Per layer: q and o 2 x 8 x 8 = 128, k and v 2 x 8
    # x 4 = 64, their biases 8 + 2 x 4 = 16, mlp 3 x 8 x 16 = 384, norms 16: 608. Two layers, 100 x 8
    # embeddings, last norm 8: 2024.
    size = read_shape(tiny_config(tmp_path))
    assert size is not None
    assert (size.parameters, size.vocabulary, size.kv_numbers_per_token) == (2024, 100, 2 * 2 * 4)
    untied = read_shape(tiny_config(tmp_path, tie_word_embeddings=False))
    assert untied is not None
    assert untied.parameters == 2024 + 800


@pytest.mark.slow  # importing transformers takes longer than all else here
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_transformers_counts(tmp_path: Path, tied: bool) -> None:
    import transformers

    path = tiny_config(tmp_path, tie_word_embeddings=tied, hidden_size=16)
    config = transformers.Qwen2Config(**json.loads(path.read_text()))
    model = transformers.Qwen2ForCausalLM(config)
    size = read_shape(path)
    assert size is not None
    assert size.parameters == sum(weight.numel() for weight in model.parameters())


def test_a_config_of_another_kind_is_not_guessed_at(tmp_path: Path) -> None:
    assert read_shape(tiny_config(tmp_path, num_hidden_layers=None)) is None
    assert read_shape(tmp_path / "none" / "config.json") is None


def test_memory_is_planned_for_a_local_model(recipe: Path, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    numbers = values(recipe, f"model.path={tmp_path}", "learner.precision=float32", "rollout.max_rows=64")
    assert numbers["model: parameters"] == "2,024"
    assert numbers["memory: KV per token"] == "64"  # 16 numbers of 4 bytes
    assert numbers["memory: KV of a step, at most"] == "0.00 GiB"
    assert numbers["memory: logits of a chunk"] == "0.00 GiB"


def test_a_process_reward_model_is_a_second_learner_and_a_frozen_model(tmp_path: Path) -> None:
    # 608 per layer as above, two layers, 20,000,000 x 8 embeddings, last norm 8: 160,001,224 parameters; x 16
    # and x 2 bytes
    (tmp_path / "small").mkdir()
    tiny_config(tmp_path, vocab_size=20_000_000)
    tiny_config(tmp_path / "small")
    prime = Path(__file__).parents[2] / "recipes/policy/prime.yaml"
    numbers = values(prime, f"model.path={tmp_path}")
    assert (numbers["memory: process reward model"], numbers["memory: its reference"]) == (
        "2.38 GiB",
        "0.30 GiB",
    )
    small = f"process_reward.path={tmp_path / 'small'}"
    numbers = values(prime, f"model.path={tmp_path}", small, f"process_reward.reference={tmp_path}")
    assert (numbers["memory: process reward model"], numbers["memory: its reference"]) == (
        "0.00 GiB",
        "0.30 GiB",
    )
    assert (
        values(prime, f"model.path={tmp_path}", "process_reward.reference=policy")["memory: its reference"]
        == "none"
    )
    assert values(prime)["memory: process reward model"] == "unknown"
    assert not any(
        "process" in name for name in values(prime.with_name("grpo.yaml"), f"model.path={tmp_path}")
    )


def test_a_reward_model_stands_beside_the_learner_as_reward_or_as_judge(tmp_path: Path) -> None:
    tiny_config(tmp_path, vocab_size=20_000_000)  # 160,001,224 parameters x 4 bytes
    recipes = Path(__file__).parents[2] / "recipes"
    ours = f"{{name: reward_model, path: {tmp_path}}}"
    assert (
        values(recipes / "policy/grpo_reward_model.yaml", f"reward.functions=[{ours}]")[
            "memory: reward model"
        ]
        == "0.60 GiB"
    )
    assert (
        values(recipes / "preference/online_dpo.yaml", f"pairs.judge={ours}")["memory: reward model"]
        == "0.60 GiB"
    )
    assert values(recipes / "policy/grpo_reward_model.yaml")["memory: reward model"] == "unknown"
