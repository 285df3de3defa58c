"""One rank of the runs that FOLDER/runs.json lists, on the backend that ``accelerate launch`` was told of.

    accelerate launch --config_file recipes/accelerate/zero2.yaml --num_processes 2 two_ranks_preferences.py
    FOLDER

A run is {"recipe", "name", "overrides"}, with "resume" that of a checkpoint, and is written to FOLDER/NAME.
FOLDER/engaged-RANK.json has facts
about its model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from rltrain.build.workflows import WORKFLOWS
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check

ROOT = Path(__file__).parents[2]


def main() -> None:
    out = Path(sys.argv[1])
    engaged = list[dict[str, Any]]()
    for kind in ("offline", "online_pairs"):
        workflow = WORKFLOWS[kind]
        WORKFLOWS[kind] = dataclasses.replace(workflow, build=record_models(workflow.build, engaged))
    for run in json.loads((out / "runs.json").read_text()):
        recipe = check(
            load_recipe(ROOT / run["recipe"], profile="tiny_cpu", overrides=run["overrides"])
        ).recipe
        assert train_command(recipe, out / run["name"], [], run.get("resume", "never")) == 0
    (out / f"engaged-{os.environ['RANK']}.json").write_text(json.dumps(engaged))


def record_models(build: Any, engaged: list[dict[str, Any]]) -> Any:
    def build_and_record(*arguments: Any) -> Any:
        run = build(*arguments)
        policy = run.learner.trained.wrapped_model
        stage = policy.zero_optimization_stage() if hasattr(policy, "zero_optimization_stage") else None
        engaged.append(
            {
                "ranks": run.learner.world_size,
                "policy": [kind.__name__ for kind in type(policy).__mro__],
                "stage": stage,
            }
        )
        return run

    return build_and_record


main()
