"""One rank of three runs on the backend that ``accelerate launch`` was told of: whole; stopped and continued;
continued for another.

    accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 two_ranks.py FOLDER
    CHECKPOINT OVERRIDE...

FOLDER/whole is a run of its own, FOLDER/resumed goes on from its middle, FOLDER/taken_over from the middle of
the run that CHECKPOINT is of, whatever backend that had. FOLDER/engaged-RANK.json says what the model really
was.
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
    checkpoint = sys.argv[2]
    overrides = sys.argv[3:]
    recipe = check(
        load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)
    ).recipe
    online = WORKFLOWS["online"]
    engaged = []

    def build(*arguments: Any) -> Any:
        run: Any = online.build(*arguments)
        trained = run.learner.trained
        parameter = next(trained.unwrapped_model.parameters())
        policy = trained.wrapped_model
        kinds = {"ranks": trained.world_size, "policy": [kind.__name__ for kind in type(policy).__mro__]}
        weights = {"parameter": type(parameter).__name__, "elements": parameter.numel()}
        engaged.append(kinds | weights | {"stage": stage_of(policy)})
        return run

    WORKFLOWS["online"] = dataclasses.replace(online, build=build)
    middle = out / "whole" / "checkpoints" / "step-2"
    for name, resume in (("whole", "auto"), ("resumed", str(middle)), ("taken_over", checkpoint)):
        assert train_command(recipe, out / name, [], resume) == 0
    (out / f"engaged-{os.environ['RANK']}.json").write_text(json.dumps(engaged))


def stage_of(policy: Any) -> int | None:
    return policy.zero_optimization_stage() if hasattr(policy, "zero_optimization_stage") else None


main()
