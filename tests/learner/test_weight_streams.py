"""Weights gathered in the engine's precision are the masters rounded, and their norms tell an update without
a gather; two processes under mixed precision.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def launch(backend: str, model: str, out: Path) -> list[dict[str, Any]]:
    """What each rank of ``two_ranks_weights.py`` saw."""
    cleared = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    environment = cleared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = ["--config_file", f"recipes/accelerate/{backend}.yaml", "--num_processes", "2"]
    script = str(Path(__file__).with_name("two_ranks_weights.py"))
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    done = subprocess.run(
        [*command, script, model, str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_shards_are_rounded_before_they_are_gathered(
    backend: str, random_tied_model: str, tmp_path: Path
) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install rltrain[deepspeed])")
    for result in launch(backend, random_tied_model, tmp_path):
        assert result["rounded_at_start"] == []  # masters are the folder's float32 weights
        assert result["exact"] == ["torch.float32"]
        assert result["rounded"] == ["torch.bfloat16"]
        assert result["differing"] == []
        assert result["unchanged"] and result["still"] == []
        assert result["ratios"] == [1.0]  # each master is on one rank, whole or in parts
