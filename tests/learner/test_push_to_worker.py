"""Two learner ranks push to one worker what one rank pushes, and no rank holds more than two buckets and the
largest tensor beyond its shards.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.launch import run_ranks

ROOT = Path(__file__).parents[2]
BUCKET = 1 << 22
# Sums, signs and blocks in float64, of the fingerprints: far below the largest tensor, so that a second copy
# of that one alone is noticed.
SLACK = 1 << 19
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12.5 million parameters, many times the size of a bucket."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6000,
        hidden_size=320,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("model") / "larger"
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def launch(backend: str, ranks: int, model: str, out: Path, precision: str) -> list[dict[str, Any]]:
    """What each rank of ``two_ranks_push.py`` saw."""
    out.mkdir()
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    arguments = [str(Path(__file__).with_name("two_ranks_push.py")), model, str(out), precision]
    run_ranks(backend, arguments, ranks=ranks, variables={"PYTHONPATH": path})
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def require_proof(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert not result["lost"] and not result["quarantined"]
        assert result["checked"] == 75
        assert result["worst"] < 1e-13
        assert result["differing"] == []
        assert 0 < result["peak"] <= 2 * BUCKET + result["largest"] + SLACK < result["total"]
    assert results[0]["served"] == ["worker"]


@pytest.mark.parametrize(("backend", "precision"), [("fsdp2", "float32"), ("zero3", "bfloat16")])
def test_two_ranks_push_what_one_rank_pushes(
    backend: str, precision: str, model: str, tmp_path: Path
) -> None:
    results = launch(backend, 2, model, tmp_path / "two", precision)
    require_proof(results)
    if precision == "float32":
        launch("ddp", 1, model, tmp_path / "one", precision)
        single = torch.load(tmp_path / "one" / "weights.pt")
        pair = torch.load(tmp_path / "two" / "weights.pt")
        # AdamW's first step is the learning rate in the gradient's sign, whatever its size: near 0 the sign
        # is rounding.
        close = [float(((single[name] - pair[name]).abs() < 1e-5).float().mean()) for name in single]
        assert min(close) > 0.99
