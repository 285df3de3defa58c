"""Every registered method on two ranks, under each backend: the gradient and the metrics of one process.

A launch makes an update for each name: policy losses, aggregates, terms, controls (which choose tokens of the
whole step), advantages, controllers, and preference losses of policies and reward models. The launches use
the users' files, over gloo; the tests inspect the prepared model.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.launch import run_ranks
from support.method_cases import (
    EXAMPLES,
    ROWS,
    Outcome,
    PolicySpread,
    PreferenceSpread,
    apart,
    every_policy_case,
    preference_cases,
)

ROOT = Path(__file__).parents[2]
CASES = every_policy_case()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    policy, other = (
        str(tiny_models.make_random_model(folder / str(seed), seed=seed, layers=1)) for seed in (0, 1)
    )
    return policy, other


@dataclass(frozen=True)
class Launched:
    backend: str
    gradients: dict[str, Tensor]  # rank 0's, by case
    ranks: list[dict[str, Any]]  # the output of each rank


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero2", "zero3"])
def launched(
    request: pytest.FixtureRequest, models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Launched:
    backend = str(request.param)
    folder = tmp_path_factory.mktemp(backend)
    (folder / "models.json").write_text(json.dumps(models))
    script = str(Path(__file__).with_name("two_ranks_every_name.py"))
    run_ranks(backend, [script, str(folder)], variables={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    wrote = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return Launched(backend, load_file(folder / "gradients.safetensors"), wrote)


@pytest.fixture(scope="module")
def single_process(models: tuple[str, str]) -> Callable[[str], Outcome]:
    """One process, the whole step at once; each case is computed once for all backends."""
    policy = PolicySpread(*models, torch.arange(ROWS))
    preference = PreferenceSpread(*models, torch.arange(EXAMPLES))

    @functools.cache
    def outcome(name: str) -> Outcome:
        return (
            policy.outcome(CASES[name])
            if name in CASES
            else preference.outcome(name.removeprefix("preference "))
        )

    return outcome


def test_both_ranks_took_part_as_what_they_are_called(launched: Launched) -> None:
    for rank in launched.ranks:
        assert len(rank["learners"]) == 3
        for learner in rank["learners"]:
            assert learner["ranks"] == 2 and learner["rows"] > 0
            # FSDP2's weights are DTensors, except those that a forward pass left gathered; ZeRO-3 keeps a
            # rank's part with each weight
            match launched.backend:
                case "ddp":
                    assert "DistributedDataParallel" in learner["policy"]
                case "fsdp2":
                    assert "FSDPModule" in learner["policy"] and "DTensor" in learner["weights"]
                case "zero2":
                    assert (
                        "DeepSpeedEngine" in learner["policy"]
                        and learner["stage"] == 2
                        and not learner["cut"]
                    )
                case "zero3":
                    assert "DeepSpeedEngine" in learner["policy"] and learner["stage"] == 3 and learner["cut"]


@pytest.mark.parametrize("name", [*CASES, *(f"preference {name}" for name in preference_cases())])
def test_two_ranks_make_the_update_of_one_process(
    name: str, launched: Launched, single_process: Callable[[str], Outcome]
) -> None:
    first, second = (rank["cases"] for rank in launched.ranks)
    want = single_process(name)
    assert want.gradient.norm() > 1e-3 and apart(want.gradient, launched.gradients[name]) < 1e-5
    assert first[name]["metrics"] == pytest.approx(want.metrics, rel=1e-4, abs=2e-6)
    assert second[name] == first[name]  # to the last bit
