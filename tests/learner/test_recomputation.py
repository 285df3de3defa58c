"""Gradient checkpointing of some layers: the gradient is the same, and the others run once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.learner.packing import build
from rltrain.learner.trained_model import TrainedModel
from rltrain.types.policy import TokenRows

LAYERS = 4
ROWS = TokenRows(((5, 6), (7,)), ((8, 9, 1), (10, 11, 12, 1)))


def gradient_and_passes(path: str, share: float) -> tuple[list[Tensor], list[int]]:
    """The gradient of some log-probs, and how often each layer ran forward for it."""
    settings = LearnerCore(optimizer=Optimizer(lr=0.0), gradient_checkpointing="auto")
    trained = TrainedModel(Model(path=path), settings, total_updates=1, seed=0)
    trained.recompute(share)
    passes: Counter[int] = Counter()
    layers: Any = trained.model.base_model.layers
    for number, layer in enumerate(layers):
        forward = layer.forward

        def counted(*arguments: Any, _forward: Any = forward, _number: int = number, **options: Any) -> Any:
            passes[_number] += 1
            return _forward(*arguments, **options)

        layer.forward = counted
    batch = build(ROWS, [0, 1], layout="padded")
    statistics = trained.forward(batch, temperature=1.0, wants=frozenset({"logp"}))
    statistics["logp"].sum().backward()
    gradients = [weight.grad for weight in trained.model.parameters() if weight.grad is not None]
    return gradients, [passes[number] for number in range(LAYERS)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = str(tmp_path_factory.mktemp("recomputed"))
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_share_of_the_layers_is_computed_twice_and_changes_no_gradient(path: str) -> None:
    every, passes = gradient_and_passes(path, 1.0)
    assert passes == [2, 2, 2, 2]
    for share, expected in ((0.6, [2, 2, 2, 1]), (0.5, [2, 2, 1, 1]), (0.0, [1, 1, 1, 1])):
        gradients, passes = gradient_and_passes(path, share)
        assert passes == expected
        assert all(torch.equal(left, right) for left, right in zip(every, gradients, strict=True))
