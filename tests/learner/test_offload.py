"""``learner.offload`` on two CPU ranks: the updates are those without it, and parts saved after the first
update go on bit for bit. What is shown is the code path; that memory is saved needs a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rltrain.errors import UserError
from rltrain.learner.ranks import request_offload

ROOT = Path(__file__).parents[2]


def updates(backend: str, offload: str, model: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    script = str(Path(__file__).with_name("offloaded_ranks.py"))
    launcher = ["--config_file", f"recipes/accelerate/{backend}.yaml", "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0"]
    cleared = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    environment = cleared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, script, model, offload, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result-0.json").read_text())


@pytest.mark.slow
def test_offloaded_updates_are_those_of_the_device(random_model: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install rltrain[deepspeed])")
    expected = updates("fsdp2", "nothing", random_model, tmp_path / "expected")
    assert expected["offloaded"] == "OffloadPolicy"
    for backend, offload, engaged in (
        ("fsdp2", "all", "CPUOffloadPolicy"),
        ("zero2", "optimizer", "['cpu', 'none']"),
        ("zero3", "all", "['cpu', 'cpu']"),
    ):
        result = updates(backend, offload, random_model, tmp_path / backend)
        assert result["offloaded"] == engaged
        assert result["weights"][2] == result["weights"][1]  # from the parts saved before the second update
        assert result["gradient"] == pytest.approx(expected["gradient"], rel=1e-5)
        for norms, reference in zip(result["weights"], expected["weights"], strict=True):
            assert norms == pytest.approx(reference, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("ranks", "variables", "offload", "said"),
    [
        ("1", {}, "all", "all, which one process cannot; launch fsdp2, zero2 or zero3, or set it to nothing"),
        ("2", {}, "optimizer", "optimizer, which ddp cannot"),
        ("2", {"ACCELERATE_USE_FSDP": "true"}, "optimizer", "which fsdp2 cannot; set it to all, or"),
        (
            "2",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            "all",
            "which ZeRO-2 cannot; set it to optimizer",
        ),
    ],
)
def test_a_backend_that_cannot_offload_is_refused_before_anything_is_loaded(
    ranks: str, variables: dict[str, str], offload: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": ranks, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        request_offload(offload)
