"""The plan counts adapters: their parameters and the bytes under them are those of real models."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rltrain.config.capacity.adapter import adapter_size
from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.constants import GB
from rltrain.config.capacity.memory import phases_of
from rltrain.config.capacity.shape import ModelShape, shape_of
from rltrain.config.capacity.workload import Workload, workload_of
from rltrain.config.load import load_recipe
from rltrain.config.plan import plan
from rltrain.config.schema import Adapter
from rltrain.learner.adapter import inject_adapter, quantization_config, target_paths
from rltrain.learner.precision import round_frozen
from support.scripts import SCRIPTS, script

OF_80_GB = int(85.5 * GB)
OF_24_GB = int(24.1 * GB)
KINDS = {
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "llama": {"num_key_value_heads": 4},
    "gpt_neox": {},
}


def facts_of(kind: str, *, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "vocab_size": 512,
        "tie_word_embeddings": tied,
        **KINDS[kind],
    }


def model_and_shape(kind: str, *, tied: bool = False) -> tuple[Any, ModelShape]:
    facts = facts_of(kind, tied=tied)
    shape = shape_of(facts)
    assert shape is not None
    rest = {key: value for key, value in facts.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **rest)).float(), shape


def load_of(recipe: str, *overrides: str) -> Workload:
    loaded = load_recipe(SCRIPTS.parent / f"recipes/{recipe}.yaml", overrides=overrides)
    return workload_of(loaded, script("model_shapes").shape_of_published)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["linear", "attention", "one name"])
def test_the_parameters_are_those_of_a_real_adapter(kind: str, targets: str) -> None:
    model, shape = model_and_shape(kind)
    name = "dense_h_to_4h" if kind == "gpt_neox" else "up_proj"
    settings = Adapter(rank=4, targets=(name,) if targets == "one name" else targets)  # pyright: ignore[reportArgumentType]
    adapter = inject_adapter(model, settings, target_paths(model, settings))
    trained = sum(weight.numel() for layer in adapter.layers.values() for weight in layer.weights)
    assert adapter_size(settings, shape).parameters == trained


def test_kappatunes_choice_is_counted_as_the_largest_it_could_make() -> None:
    _, shape = model_and_shape("qwen2")
    every = adapter_size(Adapter(rank=4), shape).parameters
    fifth = adapter_size(Adapter(rank=4, targets="kappatune", kappa_share=0.2), shape).parameters
    assert 0.2 * every < fifth < 0.5 * every  # 4 of 21 matrices, the widest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("throughout", [False, True])
def test_the_base_takes_the_bytes_of_a_real_one(tied: bool, throughout: bool) -> None:
    model, shape = model_and_shape("llama", tied=tied)
    model.requires_grad_(False)
    round_frozen(model, torch.bfloat16, throughout=throughout)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert adapter_size(Adapter(), shape).base_bytes(shape, 2, throughout=throughout) == held


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'rltrain[qlora]')",
)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_takes_the_bytes_of_a_real_one(quantize: str, tmp_path: Any) -> None:
    model, shape = model_and_shape("llama")
    model.save_pretrained(tmp_path)
    config = quantization_config(quantize, torch.float32)
    stored: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=config
    )
    held = sum(parameter.nbytes for parameter in stored.parameters())
    for module in stored.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            held += state.absmax.nbytes
    planned = adapter_size(Adapter(quantize=quantize), shape).base_bytes(shape, 4, throughout=False)  # pyright: ignore[reportArgumentType]
    assert abs(planned - held) <= 0.05 * held


def test_dpo_of_70b_fits_one_gpu_of_80_gb_in_four_bits_only() -> None:
    on_one = Cluster(1, OF_80_GB, Backend.ddp)
    phases = {phase.name: phase for phase in phases_of(load_of("preference/qlora_dpo"), on_one)}
    assert all(phase.fits for phase in phases.values())
    # 68.45e9 x 0.516 bytes, embedding in float32 and head in bfloat16, an adapter of 207e6 x 16 bytes
    assert phases["learner at rest"].total == pytest.approx((41.6 + 2.5 + 1.3) * GB, rel=0.01)
    plain = phases_of(load_of("preference/qlora_dpo", "model.adapter.quantize=none"), on_one)
    assert not all(phase.fits for phase in plain)


def test_the_learner_of_7b_grpo_fits_24_gb_and_vllm_beside_it_does_not() -> None:
    small = ("model.adapter.quantize=nf4", "learner.tokens_per_micro_batch=2048")
    load = load_of("policy/lora_grpo", *small)
    phases = {phase.name: phase for phase in phases_of(load, Cluster(1, OF_24_GB, Backend.ddp))}
    assert phases["annotate"].fits and phases["update"].fits
    # vLLM holds the base in bfloat16: 15.2 GB
    assert not phases["one row in the engine"].fits
    on_48 = Cluster(1, 48 * GB, Backend.ddp)
    assert all(phase.fits for phase in phases_of(load, on_48))


def test_7b_grpo_fits_two_gpus_of_24_gb_one_of_which_is_a_servers() -> None:
    server = ("learner.tokens_per_micro_batch=2048", "rollout.engine=vllm_server")
    on_one = Cluster(1, OF_24_GB, Backend.ddp)  # beside the server's
    in_four_bits = load_of("policy/lora_grpo", *server, "model.adapter.quantize=nf4")
    phases = {phase.name: phase for phase in phases_of(in_four_bits, on_one)}
    assert all(phase.fits for phase in phases.values())
    assert max(phases[name].total for name in ("push", "update", "save")) < 14 * GB
    # of the server: 7.62e9 parameters and two adapters of 80.7e6 in bfloat16, its work and one row
    assert phases["one row in the engine"].total == pytest.approx((15.23 + 0.32 + 2.64 + 0.09) * GB, rel=0.01)


def test_the_adapter_switched_off_takes_the_place_of_a_reference() -> None:
    with_adapter = load_of("policy/lora_grpo")
    assert (with_adapter.frozen, with_adapter.switched_off) == ((), 1)
    full = load_of("policy/lora_grpo", "model.adapter=null")
    assert ([model.role for model in full.frozen], full.switched_off) == (["reference"], 0)
    other = load_of("policy/lora_grpo", "model.reference=Qwen/Qwen2.5-7B")
    assert ([model.role for model in other.frozen], other.switched_off) == (["reference"], 0)
    prime = load_of("policy/prime", "model.adapter={}", "process_reward.reference=null")
    assert (prime.frozen, prime.switched_off) == ((), 1)


def test_the_command_names_the_adapter(tmp_path: Any) -> None:
    model, _ = model_and_shape("qwen2")
    model.config.save_pretrained(tmp_path)
    overrides = [f"model.path={tmp_path}", "model.adapter={rank: 8, quantize: nf4}"]
    recipe = load_recipe(SCRIPTS.parent / "recipes/policy/grpo.yaml", overrides=overrides)
    lines = {line.name: line for line in plan(recipe)}
    assert lines["model: parameters of the adapter"].value == f"{8 * 3 * (128 + 96 + 96 + 128 + 3 * 256):,}"
    assert "nf4" in lines["memory: base of the adapter"].note
