"""Compiled layers give the eager layers' numbers; Liger's are refused where they are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rltrain.errors import UserError
from rltrain.learner import layer_kernels
from rltrain.learner.forward import PolicyForward
from rltrain.learner.layer_kernels import decoder_layers, use_kernels
from rltrain.learner.packing import build
from rltrain.types.policy import TokenRows
from tests.support.launch import launch_ranks

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CPU = torch.device("cpu")
ROWS = TokenRows(((1, 2, 3), (4, 5)), ((6, 7, 8, 9), (3, 2, 1)))


def log_probs_and_gradients(kernels: layer_kernels.Kernels, device: torch.device = CPU) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG)
    model.to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    use_kernels(model, kernels)
    policy = PolicyForward(model).train()
    micro_batch = build(ROWS, [0, 1], layout="padded").to(device)
    logp = policy(micro_batch, temperature=1.0, wants=frozenset({"logp"}), chunk=4)["logp"]
    logp.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [
        logp.detach(),
        *(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.mark.slow
def test_compiled_layers_give_the_eager_numbers_and_gradients() -> None:
    eager, compiled = (log_probs_and_gradients(kernels) for kernels in ("eager", "compiled"))
    for value, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["fsdp2", *(pytest.param(other, marks=pytest.mark.nightly) for other in ("ddp", "zero3"))]
)
def test_ranks_that_divide_compiled_layers_train_what_eager_ones_do(
    backend: str, random_tied_model: str, tmp_path: Path
) -> None:
    for result in launch_ranks(
        Path(__file__).with_name("two_ranks_compiled.py"), backend, random_tied_model, tmp_path
    ):
        assert result["graphs"] > 0
        assert result["logp"] < 1e-5
        assert result["weights"] < 1e-5 < result["moved"]


def test_every_layer_and_nothing_else_is_compiled() -> None:
    model = LlamaForCausalLM(CONFIG)
    use_kernels(model, "compiled")
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    assert [module for module in model.modules() if module._compiled_call_impl is not None] == layers


def test_liger_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="liger-kernel is not installed: pip install liger-kernel"):
        use_kernels(LlamaForCausalLM(CONFIG), "liger")


@pytest.mark.slow
def test_ligers_kernels_give_the_eager_numbers_and_gradients() -> None:
    """Wherever they are installed; without a GPU, Triton's interpreter runs them."""
    for name in ("liger_kernel", "triton"):
        pytest.importorskip(name, reason="pip install liger-kernel triton")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(Path(__file__).with_name("liger_layers.py"))]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    interpreted = "0" if torch.cuda.is_available() else "1"
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": interpreted}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["difference"] < 1e-5
    for part in ("rms_norm_forward", "rope", "swiglu_forward", "rms_norm_backward", "swiglu_backward"):
        assert any(part in name for name in report["launched"]), report["launched"]
