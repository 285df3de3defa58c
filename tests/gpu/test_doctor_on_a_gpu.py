"""rltrain doctor on a GPU: engine and learner agree, and memory suffices, for a toy model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.gpu import NEEDS_GPU, NEEDS_VLLM
from support.scripts import SCRIPTS

pytestmark = [pytest.mark.gpu, NEEDS_GPU]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "engine", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, NEEDS_VLLM])]
)
def test_the_doctor_finds_nothing(engine: str, precision: str, random_tied_model: str) -> None:
    recipe = str(SCRIPTS.parent / "recipes/policy/grpo.yaml")
    command = [sys.executable, "-m", "rltrain", "doctor", recipe, "--profile", "tiny_cpu", "--steps", "3"]
    command += ["--engine", engine, "--set", f"model.path={random_tied_model}"]
    command += ["--set", f"learner.precision={precision}", "--set", "rollout.vllm.gpu_memory_utilization=0.2"]
    done = subprocess.run(
        command, cwd=SCRIPTS.parent, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "FAIL" not in done.stdout
