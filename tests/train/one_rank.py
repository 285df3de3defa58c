"""A command of rltrain with one fault planted, in a process that is to die of it.

    python one_rank.py COMMAND FAULT FOLDER OVERRIDE...

FAULT is "mute" (the engine never answers), "engine" (it stops answering in step 2), "killed" or "frozen"
(rank 1 ends or stops in the middle of step 2), "none".
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rltrain.cli.doctor import doctor_command
from rltrain.cli.evaluate import eval_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.train import online

ROOT = Path(__file__).parents[2]


def plant(fault: str) -> None:
    weigh, sample, calls = online.apply_methods, TransformersEngine.sample, []

    def stops_answering(engine: Any, *arguments: Any) -> Any:
        calls.append(1)
        if fault == "mute" or len(calls) == 2:
            time.sleep(600)
        return sample(engine, *arguments)

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        return weigh(*arguments)

    if fault in ("engine", "mute"):
        TransformersEngine.sample = stops_answering
    elif fault != "none":
        online.apply_methods = stops


if __name__ == "__main__":
    command, fault, folder, *overrides = sys.argv[1:]
    plant(fault)
    recipe = check(
        load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)
    ).recipe
    commands = {
        "train": lambda: train_command(recipe, Path(folder), []),
        "doctor": lambda: doctor_command(recipe, 2),
        "eval": lambda: eval_command(recipe.model.path, recipe, None),
    }
    sys.exit(commands[command]())
