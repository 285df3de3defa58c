"""Kills training runs without warning and starts them again, until enough were killed and the last one finished.

    python kill_and_resume.py FOLDER KILLS OVERRIDE...

FOLDER/whole becomes a run nobody killed. Every start is a fork of this process, which has imported everything already and starts no
threads. A run is killed at a seeded random moment, or within a save: once the folder that a checkpoint is made in is seen.
The last line written is JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # the optimizer would import it in every fork
from transformers import Qwen2ForCausalLM, Qwen2TokenizerFast  # noqa: F401  (the same)

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import read_verified
from rltrain.commands import train_command
from rltrain.config.check import check
from rltrain.config.load import load_recipe

ROOT = Path(__file__).parents[2]


def started(folder: Path, overrides: list[str]) -> int:
    """The process id of a run in ``folder``."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        recipe = check(load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)).recipe
        code = train_command(recipe, folder, [])
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(child: int, options: int = 0) -> int | None:
    """Negative for a signal; None while it runs and ``options`` say not to wait."""
    done, status = os.waitpid(child, options)
    return os.waitstatus_to_exitcode(status) if done else None


def killed(child: int, folder: Path, moment: float, within_save: bool, delay: float) -> tuple[bool, bool]:
    """(whether it was killed before it ended, whether that left a half-written checkpoint). Times in seconds."""
    left = set((folder / "checkpoints").glob(".*.tmp"))
    begun = time.monotonic()
    while (code := exit_code(child, os.WNOHANG)) is None:
        saving = set((folder / "checkpoints").glob(".step-*.tmp")) - left
        if saving if within_save else time.monotonic() - begun > moment:
            time.sleep(delay if within_save else 0)
            os.kill(child, signal.SIGKILL)
            dead = exit_code(child) == -signal.SIGKILL
            return dead, bool(set((folder / "checkpoints").glob(".step-*.tmp")) - left)
        time.sleep(0.0005)
    assert code == 0, f"the run in {folder} ended with {code}"
    return False, False


def main() -> None:
    torch.set_num_threads(1)
    out, wanted, overrides = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    draw = random.Random(0)
    begun = time.monotonic()
    assert exit_code(started(out / "whole", overrides)) == 0
    length = time.monotonic() - begun
    kills = half_written = 0
    runs = [out / "run-0"]
    while kills < wanted:
        folder, moment, delay = runs[-1], draw.uniform(0, length), draw.uniform(0, 0.03)
        dead, half = killed(started(folder, overrides), folder, moment, kills % 2 == 1, delay)
        kills, half_written = kills + dead, half_written + half
        for _, path in RunFolder(folder).present_checkpoints():
            read_verified(path)  # whatever is there under a checkpoint's name is whole
        if (folder / "model").exists():
            runs.append(out / f"run-{len(runs)}")
    assert exit_code(started(runs[-1], overrides)) == 0
    seconds = round(time.monotonic() - begun, 1)
    report = {"kills": kills, "in_a_save": half_written, "finished": [str(folder) for folder in runs], "seconds": seconds}
    sys.stdout.write(json.dumps(report) + "\n")


main()
