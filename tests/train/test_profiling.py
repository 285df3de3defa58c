"""A torch profile of the steps that a recipe names, and what an out-of-memory error leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.train.profiling import snapshot_on_out_of_memory

ROOT = Path(__file__).parents[2]


def test_a_named_step_is_profiled_and_memory_that_runs_out_names_the_plans_phase(
    random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PolicyLearner.update
    calls = []

    def run_out(self: PolicyLearner, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:118")
        return update(self, *arguments)

    monkeypatch.setattr(PolicyLearner, "update", run_out)
    overrides = [
        f"model.path={random_model}",
        "train.steps=2",
        "train.profile.steps=[1]",
        "eval.at_start=false",
    ]
    recipe = check(
        load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)
    ).recipe
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train_command(recipe, tmp_path / "run", [])

    message = str(caught.value)
    assert message.startswith("CUDA Error: out of memory at cumem_allocator.cpp:118; rltrain plan expects ")
    assert " in update on 1 GPUs: policy: weights " in message
    [trace] = (tmp_path / "run/profile").iterdir()
    assert trace.name == "step-1-rank-0.json"
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event}
    assert {"aten::mm", "autograd::engine::evaluate_function: MmBackward0"} & names


def test_a_gpus_memory_is_written_down_when_it_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_record_memory_history", "_dump_snapshot"):

        def record(*arguments: Any, name: str = name, **options: Any) -> None:
            calls.append((name, arguments or options))

        monkeypatch.setattr(torch.cuda.memory, name, record)
    error = torch.OutOfMemoryError("full")
    error.add_note("sync")
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"full; of sync; .*out-of-memory-rank-3\.pickle"),
        snapshot_on_out_of_memory(tmp_path / "memory", 3, lambda phase: f"of {phase}"),
    ):
        raise error
    file = str(tmp_path / "memory" / "out-of-memory-rank-3.pickle")
    assert calls == [
        ("_record_memory_history", {"max_entries": 100_000}),
        ("_dump_snapshot", (file,)),
        ("_record_memory_history", {"enabled": None}),
    ]
