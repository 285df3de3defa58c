"""A frozen model beside a trained one on two ranks: the same precision, a part of the weights, read once; and
the groups in which FSDP2 gathers the trained one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.support.launch import launch_ranks

SCRIPT = Path(__file__).with_name("two_ranks_frozen.py")
pytestmark = pytest.mark.slow


def make_model(folder: Path, *, tied: bool) -> str:
    """40 million parameters: enough that a copy shows in a process's memory. Stored in bfloat16, as most
    models are: a rank that reads them in float32 has a copy, where float32 would stay a map of the file.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("backend", "tied"), [("fsdp2", True), ("fsdp2", False), ("zero3", False), ("ddp", True)]
)
def test_a_frozen_model_computes_as_the_trained_one_and_is_divided(
    backend: str, tied: bool, tmp_path: Path
) -> None:
    results = launch_ranks(SCRIPT, backend, make_model(tmp_path / "model", tied=tied), tmp_path)
    for rank, result in enumerate(results):
        assert result["dtypes"] == {"frozen": ["torch.bfloat16"], "policy": ["torch.bfloat16"]}
        assert result["difference"] == 0 and result["spread"] > 0.1  # a reference with the policy's weights
        assert result["gathered"] == [] and result["iterate"] == []
        check_bytes(result, is_divided=backend != "ddp", rank=rank)
        for who in () if backend == "ddp" else ("frozen", "policy", "policy after an update"):
            peak, group = result["annotate"][who]  # FSDP2's largest group of weights, or ZeRO-3's limit
            assert group > 0 and 0 < peak <= 2 * group < result["parameters"], who
        assert backend == "ddp" or result["left"] <= result["annotate"]["policy"][1]
    check_groups(results[0]["groups"], tied=tied, backend=backend)


def check_bytes(result: dict[str, Any], *, is_divided: bool, rank: int) -> None:
    count = result["parameters"]
    if is_divided:
        assert result["bytes"] <= 2 * count / 2 + 2 * result["largest"]
    else:  # linear layers in bfloat16, the embedding in float32
        assert result["bytes"] <= 2 * count + 2 * result["largest"] + 1e6
    if rank > 0:  # rank 0 reads the model and sends one tensor at a time
        assert result["loading"] <= result["bytes"] + 8 * result["largest"] + 16e6
        assert result["masters"] <= 8 * result["largest"] + 16e6


def check_groups(groups: dict[str, list[str]], *, tied: bool, backend: str) -> None:
    """Embedding and head are gathered when they are needed, not with the first layer."""
    if backend != "fsdp2":
        assert groups == {}
        return
    assert groups[""] == []
    tail = ["model.model.norm.weight", "model.model.embed_tokens.weight" if tied else "model.lm_head.weight"]
    assert groups["model.lm_head"] == tail
    assert groups["model.model.embed_tokens"] == (tail if tied else ["model.model.embed_tokens.weight"])
    assert {f"model.model.layers.{layer}" for layer in range(8)} < groups.keys()
