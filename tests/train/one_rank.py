"""A command of rltrain with one fault planted, in a process that is to die of it.

    python one_rank.py COMMAND FAULT FOLDER OVERRIDE...

FAULT is "mute" (the engine never answers), "engine" (it stops answering in step 2), "killed" or "frozen" (rank 1 ends or stops in the
middle of step 2), "none".
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rltrain.commands import eval_command, train_command
from rltrain.commands_doctor import doctor_command
from rltrain.config.check import check
from rltrain.config.load import load_recipe
from rltrain.rollout.transformers_engine import TransformersEngine
from rltrain.train import online

ROOT = Path(__file__).parents[2]


def plant(fault: str) -> None:
    weigh, generate, calls = online.weigh, TransformersEngine.generate, []

    def stops_answering(engine: Any, *arguments: Any) -> Any:
        calls.append(1)
        if fault == "mute" or len(calls) == 2:
            time.sleep(600)
        return generate(engine, *arguments)

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        return weigh(*arguments)

    if fault in ("engine", "mute"):
        TransformersEngine.generate = stops_answering
    elif fault != "none":
        online.weigh = stops


if __name__ == "__main__":
    command, fault, folder, *overrides = sys.argv[1:]
    plant(fault)
    recipe = check(load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)).recipe
    commands = {
        "train": lambda: train_command(recipe, Path(folder), []),
        "doctor": lambda: doctor_command(recipe, 2),
        "eval": lambda: eval_command(recipe.model.path, recipe, None),
    }
    sys.exit(commands[command]())
