"""AdamW with moments of 8 bits: its state goes on bit for bit, whole and in parts, and is refused in one line
where bitsandbytes is not installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rltrain.checkpoint.shards import ShardedTensors, write_parts
from rltrain.config.capacity.constants import MOMENT_BYTES_8BIT
from rltrain.config.rules import optimizer as rules
from rltrain.config.schema import Optimizer
from rltrain.learner.optim import build_optimizer, optimizer_parts, optimizer_tensors, restore_optimizer

SETTINGS = Optimizer(name="adamw_8bit", lr=1e-2, weight_decay=0.1)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64))  # 8,192 numbers in 8 bits; 4,096; biases


def update(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("form", ["whole", "parts"])
def test_a_restored_state_goes_on_bit_for_bit(form: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = a_model()
    optimizer = build_optimizer(model.named_parameters(), SETTINGS)
    for number in range(3):
        update(model, optimizer, number)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    named = list(model.named_parameters())
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, named)}
    assert tensors["0.weight/state1"].dtype == torch.uint8 and float(tensors["0.weight/step"]) == 3
    moments = sum(tensors[f"0.weight/{slot}"].nbytes for slot in ("state1", "state2", "absmax1", "absmax2"))
    assert moments == MOMENT_BYTES_8BIT * model.state_dict()["0.weight"].numel()
    if form == "parts":
        write_parts(tmp_path, list(optimizer_parts(optimizer, named, 0, 1)), None)
        read = ShardedTensors(tmp_path)
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        assert set(read) == set(tensors)
        tensors = read
    update(model, optimizer, 3)

    resumed = a_model()
    resumed.load_state_dict(weights)
    second = build_optimizer(resumed.named_parameters(), SETTINGS)
    restore_optimizer(second, list(resumed.named_parameters()), tensors)
    update(resumed, second, 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    state = dict(optimizer_tensors(optimizer, named))
    for name, tensor in optimizer_tensors(second, list(resumed.named_parameters())):
        assert torch.equal(tensor, state[name]), name


def test_the_first_updates_are_those_of_adamw() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    small, exact = a_model(), a_model()
    for model, settings in ((small, SETTINGS), (exact, SETTINGS.model_copy(update={"name": "adamw"}))):
        optimizer = build_optimizer(model.named_parameters(), settings)
        for number in range(3):
            update(model, optimizer, number)
    for name, weight in exact.state_dict().items():
        # of three updates of up to 1e-2; moments are off by at most a 256th of their block's largest
        difference = (weight - small.state_dict()[name]).abs()
        assert difference.mean() < 5e-4, name


def test_a_recipe_that_asks_for_it_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    [problem] = rules.optimizer_problems("learner.optimizer", SETTINGS)
    assert problem.startswith("learner.optimizer.name is adamw_8bit, and bitsandbytes is not installed")
    assert list(rules.optimizer_problems("learner.optimizer", Optimizer(lr=1e-2))) == []
