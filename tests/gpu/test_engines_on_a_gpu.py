"""Engines on a GPU: the contract suite, and an engine's memory and log-probs beside a learner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.gpu import NEEDS_GPU, NEEDS_VLLM
from support.scripts import SCRIPTS

pytestmark = [pytest.mark.gpu, NEEDS_GPU]
ROOT = SCRIPTS.parent


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: vLLM's memory pool can exist once per process."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.parametrize(
    "engine", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, NEEDS_VLLM])]
)
def test_the_contract_suite_passes(engine: str) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contracts/test_engine.py", "-k", engine]
    done = run_python(*command)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def measurements(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of scripts/bench_gpu.py, with vLLM where it is installed."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    done = run_python("scripts/bench_gpu.py", "--tiny", "--json", str(file), "sleep", "mismatch")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(Path(file).read_text())["results"]


def test_sleep_returns_memory_and_wake_takes_it_back(measurements: list[dict[str, Any]]) -> None:
    states = {item["what"]: item for item in measurements if item.get("cycle") == 1}
    if states["asleep"]["engine"] != "vllm":
        pytest.skip("vllm is not installed: the embedded engine of a toy model is too small to be seen")
    assert states["asleep"]["used_gb"] < states["loaded"]["used_gb"]


def test_engine_and_learner_agree_with_either_head(measurements: list[dict[str, Any]]) -> None:
    mismatch = {item["fp32_head"]: item["mean"] for item in measurements if item["what"] == "mismatch"}
    assert max(mismatch.values()) < 0.05  # nats per token, where a run warns (build/rollout.py)
    assert mismatch[True] <= 1.1 * mismatch[False]
