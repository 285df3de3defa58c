"""Weights under the names of a checkpoint: exactly what a folder holds, group by group, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rltrain.weight_names import CheckpointNames
from support.scripts import script

SCRIPT = script("architectures_vllm")
FUSED = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "glm4_moe", "deepseek_v3", "granitemoe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: SCRIPT.tiny(name, tmp_path_factory.mktemp(name)) for name in SCRIPT.ARCHITECTURES}


@pytest.mark.parametrize("name", SCRIPT.ARCHITECTURES)
def test_the_names_are_those_of_the_folder_and_lead_back_to_the_model(
    name: str, folders: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    names = CheckpointNames(model)
    state = model.state_dict()
    stored = load_file(folders[name] / "model.safetensors")
    sent = dict(names.to_checkpoint(state.items()))
    assert sent.keys() - names.ties.keys() == stored.keys()
    assert all(torch.equal(sent[key], weight) for key, weight in stored.items())
    assert all(torch.equal(sent[second], sent[first]) for second, first in names.ties.items())
    assert {key: tuple(weight.shape) for key, weight in sent.items()} == names.shapes
    back = dict(names.from_checkpoint(sent.items()))
    assert back.keys() == state.keys() and all(
        torch.equal(back[key], weight) for key, weight in state.items()
    )


@pytest.mark.parametrize("name", FUSED)
def test_a_model_that_was_never_loaded_has_the_same_names(name: str, folders: dict[str, Path]) -> None:
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders[name]))
    loaded = AutoModelForCausalLM.from_pretrained(folders[name])
    names = CheckpointNames(fresh)
    expected = CheckpointNames(loaded)
    assert names.shapes == expected.shapes
    assert names.parameters == expected.parameters
    assert names.inside == expected.inside


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_no_more_than_one_group_is_held_while_weights_pass(name: str, folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    names = CheckpointNames(model)
    state = model.state_dict()
    numbers_in = numbers_out = largest_held = 0

    def count_weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal numbers_in
        for key, weight in state.items():
            numbers_in += weight.numel()
            yield key, weight

    for _, weight in names.to_checkpoint(count_weights()):
        largest_held = max(largest_held, numbers_in - numbers_out)
        numbers_out += weight.numel()
    assert numbers_in == numbers_out == sum(weight.numel() for weight in state.values())
    assert largest_held == max(weight.numel() for key, weight in state.items() if "gate_up_proj" in key)


def test_only_the_groups_that_hold_a_wanted_name_are_converted(folders: dict[str, Path]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folders["mixtral"], dtype=torch.float32)
    names = CheckpointNames(model)
    requested = {"model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.norm.weight"}
    some = dict(names.to_checkpoint(model.state_dict().items(), requested))
    assert requested <= some.keys()
    assert {key.rpartition(".experts.")[0] for key in some if "experts" in key} == {
        "model.layers.1.block_sparse_moe"
    }
    assert not any(".w2." in key or ".self_attn." in key for key in some)


def test_a_name_of_another_model_is_refused(folders: dict[str, Path]) -> None:
    names = CheckpointNames(AutoModelForCausalLM.from_pretrained(folders["qwen3_moe"]))
    with pytest.raises(KeyError, match=r"w1\.weight"):
        list(names.from_checkpoint([("model.layers.0.block_sparse_moe.experts.0.w1.weight", torch.zeros(1))]))
