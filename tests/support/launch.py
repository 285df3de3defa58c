"""Starts a script on two ranks, with a user's file for a backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def launch_ranks(script: Path, backend: str, model: str, out: Path) -> list[dict[str, Any]]:
    """What each of two ranks of ``script MODEL OUT`` wrote into OUT/rank-<number>.json.

    backend: a name in recipes/accelerate. Skips the test where DeepSpeed is needed and not installed.
    """
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install rltrain[deepspeed])")
    cleared = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    environment = cleared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = ["--config_file", f"recipes/accelerate/{backend}.yaml", "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(script), model, str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]
