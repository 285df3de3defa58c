"""Every registered method on two ranks under DDP: the gradient and the metrics of one process.

One launch takes an update for each name: policy losses, aggregates, terms, controls (which choose tokens of the whole step), advantages,
controllers, and preference losses of policies and reward models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from every_name import EXAMPLES, ROWS, PolicySpread, PreferenceSpread, apart, every_policy_case, preference_cases

ROOT = Path(__file__).parents[2]
CASES = every_policy_case()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    policy, other = (str(tiny_models.make_random_model(folder / str(seed), seed=seed, layers=1)) for seed in (0, 1))
    return policy, other


@pytest.fixture(scope="module")
def ranks(models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Rank 0's gradients by case, and what each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "models.json").write_text(json.dumps(models))
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment = cleared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    several = ["--config_file", "recipes/accelerate/ddp.yaml", "--num_processes", "2", "--main_process_port", "0"]
    script = str(Path(__file__).with_name("two_ranks_every_name.py"))
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, script, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return load_file(folder / "gradients.safetensors"), [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(models: tuple[str, str]) -> tuple[PolicySpread, PreferenceSpread]:
    """One process, the whole step at once."""
    return PolicySpread(*models, torch.arange(ROWS)), PreferenceSpread(*models, torch.arange(EXAMPLES))


def test_both_ranks_took_part(ranks: tuple[dict[str, Tensor], list[dict[str, Any]]]) -> None:
    for one in ranks[1]:
        assert len(one["learners"]) == 3
        for learner in one["learners"]:
            assert learner["ranks"] == 2 and "DistributedDataParallel" in learner["policy"] and learner["rows"] > 0


@pytest.mark.parametrize("name", [*CASES, *(f"preference {name}" for name in preference_cases())])
def test_two_ranks_make_the_update_of_one_process(
    name: str, ranks: tuple[dict[str, Tensor], list[dict[str, Any]]], alone: tuple[PolicySpread, PreferenceSpread]
) -> None:
    gradients, (first, second) = ranks[0], [one["cases"] for one in ranks[1]]
    policy, preference = alone
    want = policy.outcome(CASES[name]) if name in CASES else preference.outcome(name.removeprefix("preference "))
    assert want.gradient.norm() > 1e-3 and apart(want.gradient, gradients[name]) < 1e-5
    assert first[name]["metrics"] == pytest.approx(want.metrics, rel=1e-4, abs=2e-6)
    assert second[name] == first[name]  # to the last bit
