"""Every loader refuses a model folder that does not hold exactly the tensors of its architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.data.tokenization import tokenization_of
from rltrain.errors import UserError
from rltrain.learner.frozen_models import frozen_model, load_frozen, reference_weights, require_companion
from rltrain.learner.loading import Head, load_causal_lm, require_weights
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.learner.reward_learner import load_reward_model
from rltrain.learner.reward_model import RewardModel
from support.architectures import tiny

Tensors = dict[str, Tensor]


def changed(source: str, out: Path, change: Callable[[Tensors], Any]) -> str:
    """A copy of the folder whose weights ``change`` edited."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return str(out)


def without_a_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def renamed(tensors: Tensors) -> None:
    tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")


def with_a_value_head(tensors: Tensors) -> None:
    tensors["v_head.summary.weight"] = torch.zeros(1, 64)


def cut(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-3]


def without_one_bias(tensors: Tensors) -> None:
    del tensors["model.layers.0.self_attn.q_proj.bias"]


BROKEN = {
    without_a_layer: "12 missing .model.layers.1.input_layernorm.weight.* and 9 more",
    without_one_bias: "1 missing .model.layers.0.self_attn.q_proj.bias.",
    renamed: "1 missing .model.norm.weight.; 1 unexpected .model.final_norm.weight.",
    with_a_value_head: "1 unexpected .v_head.summary.weight.",
    cut: r"1 of another shape .model.embed_tokens.weight \(98, \d+\) instead of \(101, \d+\)",
}


def core() -> LearnerCore:
    return LearnerCore(optimizer=Optimizer(lr=1e-3))


def as_the_policy(path: str, sound: str) -> PreferenceLearner:
    return PreferenceLearner(Model(path=path), core(), total_updates=1, seed=0)


def as_a_reference(path: str, sound: str) -> object:
    return load_frozen(path, Model(path=sound), as_the_policy(sound, sound).trained)


def as_a_frozen_model(path: str, sound: str) -> None:
    with frozen_model(path, Model(path=sound), as_the_policy(sound, sound).trained):
        pass


def as_an_engines_reference(path: str, sound: str) -> object:
    trained = as_the_policy(sound, sound).trained
    return reference_weights(Model(path=sound, reference=path), trained, torch.float32)


def as_a_companion(path: str, sound: str) -> None:
    require_companion(
        tokenization_of(Model(path=sound), {}).tokenizer,
        sound,
        "model.teacher",
        path,
        head="logits",
        sizes={},
    )


def before_memory_is_spent(path: str, sound: str) -> None:
    require_weights(path, None, "logits")


def as_the_start_of_a_reward_model(path: str, sound: str) -> object:
    return load_reward_model(path, None, "auto")


LOADERS = (
    as_the_policy,
    as_a_reference,
    as_a_frozen_model,
    as_an_engines_reference,
    as_a_companion,
    before_memory_is_spent,
    as_the_start_of_a_reward_model,
)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("change", BROKEN)
def test_every_loader_refuses_a_folder_that_is_not_its_architectures(
    change: Callable[[Tensors], None], load: Callable[[str, str], object], random_model: str, tmp_path: Path
) -> None:
    broken = changed(random_model, tmp_path / "broken", change)
    with pytest.raises(UserError, match=BROKEN[change]) as refused:
        load(broken, random_model)
    assert "\n" not in str(refused.value) and broken in str(refused.value)


@pytest.mark.parametrize("fixture", ["random_model", "random_tied_model"])
@pytest.mark.parametrize("head", ["logits", "new scalar"])
def test_a_complete_folder_is_accepted(fixture: str, head: Head, request: pytest.FixtureRequest) -> None:
    require_weights(request.getfixturevalue(fixture), None, head)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_neox", "gemma3", "mamba"])
def test_folders_whose_tensors_are_renamed_or_fused_on_load_are_accepted(name: str, tmp_path: Path) -> None:
    require_weights(str(tiny(name, tmp_path / name)), None, "logits")


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    complete = str(tiny("mixtral", tmp_path / "complete"))
    expert = next(
        name for name in load_file(tmp_path / "complete" / "model.safetensors") if "experts.2." in name
    )
    broken = changed(complete, tmp_path / "broken", lambda tensors: tensors.pop(expert))
    with pytest.raises(
        UserError, match=r"its tensors are not those of Mixtral|does not load as a causal language model"
    ):
        require_weights(broken, None, "logits")
    with pytest.raises(UserError):
        load_causal_lm(broken, None, "auto")


# reward models ----------------------------------------------------------------------------------------------


@pytest.fixture
def reward_model(random_model: str, tmp_path: Path) -> str:
    """The folder of a trained reward model, as a run writes it."""
    out = tmp_path / "reward"
    load_reward_model(random_model, None, "auto").save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(random_model) / name, out / name)
    return str(out)


def scored(path: str) -> list[float]:
    sizes = {"max_tokens": 16, "tokens_per_micro_batch": 64}
    return RewardModel(path, prompt_column=None, device=torch.device("cpu"), **sizes).scores([(5, 6, 7)])


def test_a_reward_model_is_accepted_with_or_without_the_language_head_it_does_not_use(
    reward_model: str, tmp_path: Path
) -> None:
    with_both = changed(
        reward_model,
        tmp_path / "both",
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(101, 64)}),
    )
    for folder in (reward_model, with_both):
        require_weights(folder, None, "scalar")
    assert scored(reward_model) == scored(with_both)


def test_a_reward_model_without_its_head_is_called_a_language_model(
    random_model: str, reward_model: str, tmp_path: Path
) -> None:
    headless = changed(reward_model, tmp_path / "headless", lambda tensors: tensors.pop("score.weight"))
    for folder in (headless, random_model):
        for load in (scored, lambda folder: require_weights(folder, None, "scalar")):
            with pytest.raises(UserError, match=r"has no score.weight: it is a language model|2 outputs"):
                load(folder)


@pytest.mark.parametrize("change", [without_a_layer, renamed, with_a_value_head, cut])
def test_an_incomplete_reward_model_is_refused(
    change: Callable[[Tensors], None], reward_model: str, tmp_path: Path
) -> None:
    broken = changed(reward_model, tmp_path / "broken", change)
    with pytest.raises(UserError, match=BROKEN[change]):
        scored(broken)


def test_another_libraries_head_is_not_dropped_for_a_new_one(random_model: str, tmp_path: Path) -> None:
    other = changed(random_model, tmp_path / "other", with_a_value_head)
    with pytest.raises(UserError, match=r"1 unexpected .v_head.summary.weight."):
        load_reward_model(other, None, "auto")


def test_an_architecture_that_transformers_does_not_know_is_one_line(
    random_model: str, tmp_path: Path
) -> None:
    shutil.copytree(random_model, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UserError, match="does not load as a causal language model") as refused:
        require_weights(str(tmp_path / "other"), None, "logits")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
