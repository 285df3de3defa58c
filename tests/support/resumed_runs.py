"""What tests of stopped and continued runs share: how a run is stopped, and when two runs are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from rltrain.checkpoint.run_state import is_sharded, read_state
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.report.names import reproducible_metrics

ROOT = Path(__file__).parents[2]
# a reward that an untrained model gets some of
SEVENS = f"{Path(__file__).parents[1] / 'golden/sevens.py'}:sevens"
# What any resumed run could forget: momentum, a schedule in its middle, several updates per step,
# evaluations.
TWO_HALVES = (
    "train.steps=6",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "rollout.prompts=8",
    "rollout.n=4",
    "eval.every=3",
    "eval.prompts=4",
    "eval.n=2",
    "eval.k=[1]",
    "learner.updates=2",
    "learner.optimizer.lr=2e-3",
    "learner.optimizer.schedule=cosine",
    "learner.optimizer.warmup_steps=2",
    "reward.workers=1",
)
# Besides, a prompt order that has begun its second epoch after step 3 (26 prompts, 8 per step), and replaced
# groups.
SETTINGS = (*TWO_HALVES, "data.max_prompts=26", "rollout.dynamic_sampling={max_rounds: 2}")


def train_here(
    model: str, folder: Path, *overrides: str, resume: str = "auto", recipe_name: str = "grpo"
) -> int:
    """``rltrain train`` in this process; its exit code."""
    settings = [f"model.path={model}", f"reward.functions=['{SEVENS}']", *SETTINGS, *overrides]
    recipe = check(
        load_recipe(ROOT / f"recipes/policy/{recipe_name}.yaml", profile="tiny_cpu", overrides=settings)
    ).recipe
    return train_command(recipe, folder, [], resume)


class Killed(BaseException):
    """As abrupt as it gets within one process."""


@contextmanager
def at_call(number: int, module: ModuleType, name: str, act: Callable[[], object]) -> Iterator[None]:
    """Inside, the call of ``module.name`` with this number does ``act`` first."""
    original, calls = getattr(module, name), []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            act()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counted)
        yield


def killed_in(number: int, module: ModuleType, name: str, call: Callable[[], object]) -> None:
    """``call()`` until ``module.name`` is called for the time of this number: once a step, in a
    training loop.
    """
    with at_call(number, module, name, _die), pytest.raises(Killed):
        call()


def _die() -> NoReturn:
    raise Killed


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without times and memory."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [reproducible_metrics(line) for line in read]


def differing(left: Path, right: Path, *names: str) -> list[str]:
    """Which tensors of these safetensors below both folders are not equal bit for bit; a tensor that
    only one side has is among them.
    """
    different: list[str] = []
    for name in names:
        first, second = load_file(left / name), load_file(right / name)
        keys = first.keys() | second.keys()
        assert keys, f"{name} holds no tensor"
        different += [
            f"{name}: {key}"
            for key in keys
            if key not in first or key not in second or not torch.equal(first[key], second[key])
        ]
    return different


def assert_equal_tensors(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit, and at least one."""
    assert set(left) == set(right) and left
    assert not [name for name in left if not torch.equal(left[name], right[name])]


def assert_same_run(left: Path, right: Path, step: int = 6) -> None:
    assert lines(left) == lines(right)
    assert (left / "transcripts.jsonl").read_bytes() == (right / "transcripts.jsonl").read_bytes()
    saved = f"checkpoints/step-{step}"
    assert not differing(left, right, "model/model.safetensors")
    if is_sharded(left / saved):
        assert_equal_tensors(read_state(left / saved).tensors, read_state(right / saved).tensors)
    else:
        assert not differing(
            left, right, f"{saved}/model.safetensors", f"{saved}/training/optimizer.safetensors"
        )
    states = [json.loads((run / saved / "training/state.json").read_text()) for run in (left, right)]
    for state in states:
        del state["reported"]["metrics.jsonl"]  # the clock's digits have lengths of their own
        del state["environment"]  # somebody may commit meanwhile
    assert states[0] == states[1]
    assert (left / "model/README.md").read_bytes() == (right / "model/README.md").read_bytes()
