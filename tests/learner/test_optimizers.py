"""RMSprop and Muon: who updates what, the numbers of PyTorch's own optimizers, and exact resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rltrain.config.schema import Optimizer
from rltrain.errors import UserError
from rltrain.learner import ranks
from rltrain.learner.optim import (
    MuonWithAdamW,
    build_optimizer,
    build_schedule,
    hidden_matrices,
    optimizer_tensors,
    restore_optimizer,
)

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG)


def settings_of(name: str) -> Optimizer:
    return Optimizer.model_validate(
        {"name": name, "lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1 if name == "muon" else 0.0}
    )


def optimizer_of(model: Any, name: str) -> torch.optim.Optimizer:
    return build_optimizer(model.named_parameters(), settings_of(name), matrices=hidden_matrices(model))


def take_steps(model: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        ids = torch.arange(8)[None] * (step + 1) % 31
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def test_muon_updates_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = model_of()
    optimizer = optimizer_of(model, "muon")
    assert isinstance(optimizer, MuonWithAdamW)
    take_steps(model, optimizer, 0, 1)
    slots = {name: set(optimizer.state[weight]) for name, weight in model.named_parameters()}
    muons = {name for name, kept in slots.items() if kept == {"momentum_buffer"}}
    layer = "model.layers.0"
    attention = {f"{layer}.self_attn.{side}_proj.weight" for side in "qkvo"}
    assert muons == attention | {f"{layer}.mlp.{side}_proj.weight" for side in ("gate", "up", "down")}
    assert all(kept == {"exp_avg", "exp_avg_sq", "step"} for name, kept in slots.items() if name not in muons)


def test_the_steps_are_those_of_pytorchs_two_optimizers() -> None:
    ours = model_of()
    expected = copy.deepcopy(ours)
    names = hidden_matrices(expected)
    hidden = [weight for name, weight in expected.named_parameters() if name in names]
    others = [weight for name, weight in expected.named_parameters() if name not in names]
    matrices = [weight for weight in others if weight.dim() == 2]
    vectors = [weight for weight in others if weight.dim() < 2]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), fused=True)
    take_steps(ours, optimizer_of(ours, "muon"), 0, 3)
    for step in range(3):
        ids = torch.arange(8)[None] * (step + 1) % 31
        expected.zero_grad()
        expected(input_ids=ids, labels=ids).loss.backward()
        muon.step()
        adamw.step()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name), rtol=0, atol=0)


def test_rmsprop_is_the_one_of_dpos_release() -> None:
    # torch.optim.RMSprop(lr) with its defaults: the squares decay by 0.99
    ours = model_of()
    expected = copy.deepcopy(ours)
    take_steps(ours, optimizer_of(ours, "rmsprop"), 0, 3)
    take_steps(expected, torch.optim.RMSprop(expected.parameters(), lr=0.01), 0, 3)
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rmsprop", "muon"])
def test_a_restored_optimizer_goes_on_to_the_bit(name: str) -> None:
    model = model_of()
    optimizer = optimizer_of(model, name)
    schedule = build_schedule(optimizer, settings_of(name), 6)
    take_steps(model, optimizer, 0, 3)
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, model.named_parameters())}
    resumed = model_of(1)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    second = optimizer_of(resumed, name)
    restore_optimizer(second, list(resumed.named_parameters()), saved)
    take_steps(model, optimizer, 3, 6)
    take_steps(resumed, second, 3, 6)
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight, resumed.get_parameter(key), rtol=0, atol=0)
    assert schedule.optimizer is optimizer


def test_a_schedule_reaches_both_parts_of_muon() -> None:
    model = model_of()
    optimizer = optimizer_of(model, "muon")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, 0, 2)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "backend", "refused"),
    [
        ("muon", "fsdp2", "needs whole matrices, and fsdp2 divides them"),
        ("muon", "deepspeed", "needs whole matrices, and deepspeed divides them"),
        ("adamw_8bit", "fsdp2", "whose blocks fsdp2 would divide anywhere"),
        ("rmsprop", "deepspeed", None),
        ("rmsprop", "fsdp2", None),
        ("muon", "ddp", None),
        ("adamw", "deepspeed", None),
    ],
)
def test_a_backend_that_cannot_is_refused(
    name: str, backend: str, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "started_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "requested_backend", lambda: backend)
    if refused is None:
        ranks.require_backend_of(name)
    else:
        with pytest.raises(UserError, match=refused):
            ranks.require_backend_of(name)
