"""One rank of an update with every registered method, on the backend that ``accelerate launch`` was told of.

    PYTHONPATH=.:tests accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2
    two_ranks_every_name.py FOLDER

FOLDER/models.json names the policy and the other model. The output is FOLDER/gradients.safetensors (rank 0)
and FOLDER/rank-RANK.json: facts about the learners, how many rows this rank read, and for each case the
metrics and a digest of the gradient.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rltrain.learner.ranks import connect
from support.method_cases import (
    EXAMPLES,
    ROWS,
    PolicySpread,
    PreferenceSpread,
    every_policy_case,
    preference_cases,
)

SETTINGS = {"tokens_per_micro_batch": 32}  # two or three micro-batches for each of two ranks


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    connect(deadline_seconds=120.0)
    models = json.loads((folder / "models.json").read_text())
    policies = PolicySpread(*models, torch.arange(ROWS), **SETTINGS)
    preferences = PreferenceSpread(*models, torch.arange(EXAMPLES), **SETTINGS)
    kinds = [observe_learner(learner) for learner in (policies.learner, *preferences.learners)]
    gradients = dict[str, Tensor]()
    cases = dict[str, dict[str, Any]]()
    for name, case in every_policy_case().items():
        gradients[name], metrics = policies.outcome(case)
        cases[name] = {"metrics": metrics, "digest": digest(gradients[name])}
    for name in preference_cases():
        key = f"preference {name}"
        gradients[key], metrics = preferences.outcome(name)
        cases[key] = {"metrics": metrics, "digest": digest(gradients[key])}
    if rank == 0:
        save_file(gradients, folder / "gradients.safetensors")
    (folder / f"rank-{rank}.json").write_text(json.dumps({"learners": kinds, "cases": cases}))


def observe_learner(learner: Any) -> dict[str, Any]:
    """Facts about the learner; ``rows`` counts the rows that this rank reads."""
    model = learner.trained.unwrapped_model
    policy = learner.trained.wrapped_model
    weights = list(model.parameters())
    facts = {
        "ranks": learner.world_size,
        "policy": [kind.__name__ for kind in type(policy).__mro__],
        "rows": 0,
    }
    stage = policy.zero_optimization_stage() if hasattr(policy, "zero_optimization_stage") else None
    cut = [weight.ds_tensor.numel() < weight.ds_numel for weight in weights if hasattr(weight, "ds_tensor")]
    facts |= {
        "weights": sorted({type(weight).__name__ for weight in weights}),
        "cut": bool(cut) and all(cut),
        "stage": stage,
    }

    def count(_: Any, arguments: Any) -> None:
        facts["rows"] += len(arguments[0].rows)

    model.register_forward_pre_hook(count)
    return facts


def digest(gradient: Tensor) -> str:
    return hashlib.sha256(gradient.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
