"""One run distributed in five ways: each has the trajectory of one process, and any backend continues the
checkpoints of any other.

The launches use the users' files. On a machine without a GPU they run over gloo; ``learner/ranks.py`` ensures
that FSDP2 and DeepSpeed really run there, and these tests inspect the prepared model to verify it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
# Every step has a gradient: if it were only rounding noise, AdamW would make steps that differ between
# machines.
REWARD = """
from rltrain.reward.score import Score

def odd(inputs):
    shares = [sum(ord(letter) % 2 for letter in text) / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.5)}) for share in shares]
"""
# Aspects in which backends could differ: several micro-batches on each rank (32 rows of 12 tokens), active
# clipping (the norm is about 3), weight decay on matrices only, two updates per step, a frozen reference,
# momentum and schedule across a checkpoint. AdamW's eps is above the rounding noise of a gradient (about
# 1e-9); otherwise AdamW would turn that noise into steps of the size of the learning rate.
SETTINGS = (
    "train.steps=4",
    "train.deadline_seconds=120",
    "checkpoint.every=2",
    "rollout.prompts=8",
    "rollout.n=4",
    "rollout.mismatch_stop=1e-4",
    "rollout.mismatch_patience=1",
    "learner.updates=2",
    "learner.tokens_per_micro_batch=96",
    "learner.optimizer.lr=5e-4",
    "learner.optimizer.eps=1e-5",
    "learner.optimizer.weight_decay=0.1",
    "learner.optimizer.max_grad_norm=0.5",
    "learner.optimizer.schedule=cosine",
    "data.eval=null",
    "reward.workers=1",
)
COMPARED = ("loss/total", "learner/grad_norm", "learner/entropy_mean", "reward/mean", "rollout/mismatch_abs")
pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    cleared = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    return cleared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def overrides(model: str, folder: Path) -> list[str]:
    (folder / "odd.py").write_text(REWARD)
    return [f"model.path={model}", f"reward.functions=['{folder / 'odd.py'}:odd']", *SETTINGS]


@pytest.fixture(scope="module", params=["untied", "tied"])
def single_process(
    request: pytest.FixtureRequest,
    random_model: str,
    random_tied_model: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp(f"alone-{request.param}")
    settings = overrides(random_tied_model if request.param == "tied" else random_model, folder)
    words = [word for setting in settings for word in ("--set", setting)]
    command = [
        "-m",
        "rltrain",
        "train",
        "recipes/policy/grpo.yaml",
        "--profile",
        "tiny_cpu",
        "--run",
        str(folder / "whole"),
        *words,
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "overrides.json").write_text(json.dumps(settings))
    return folder


def launch(backend: str, folder: Path, single_process: Path) -> list[dict[str, Any]]:
    """Runs ``two_ranks.py`` under ``recipes/accelerate/<backend>.yaml`` and returns facts about each rank's
    model, one entry per run.
    """
    launcher = [
        "--config_file",
        f"recipes/accelerate/{backend}.yaml",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    settings = json.loads((single_process / "overrides.json").read_text())
    arguments = [
        str(Path(__file__).with_name("two_ranks.py")),
        str(folder),
        str(single_process / "whole/checkpoints/step-2"),
        *settings,
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [run for rank in range(2) for run in json.loads((folder / f"engaged-{rank}.json").read_text())]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(run_folder: Path, expected: Path, *, first: int = 0) -> None:
    """Metrics from step ``first`` + 1 on, and the last weights, up to the order of float32 sums."""
    lines = metrics(run_folder)
    expected_lines = metrics(expected)[first:]
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for line, want in zip(lines, expected_lines, strict=True):
        for name in COMPARED:
            assert line[name] == pytest.approx(want[name], rel=1e-4, abs=2e-6), (line["step"], name)
    weights, expected_weights = (load_file(run / "model/model.safetensors") for run in (run_folder, expected))
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert (weight - expected_weights[name]).abs().max() < 2e-5, name  # of 8 updates of up to 5e-4


def assert_no_second_model(peaks: dict[str, int], *, is_writer: bool) -> None:
    """No rank holds more than two gathered tensors beside its shards; the writer also holds one file's."""
    assert 0 < peaks["push"] <= 2 * peaks["largest"]
    for stream in () if is_writer else ("save", "optimizer"):
        assert 0 < peaks[stream] <= 2 * peaks["largest"], stream


def assert_equal(run_folder: Path, expected: Path) -> None:
    """Bit for bit: the metrics of the steps that both have, the weights, the optimizer's state."""
    steps = {line["step"]: line for line in metrics(expected)}
    for line in metrics(run_folder):
        assert {k: v for k, v in line.items() if not k.startswith("time/")} == {
            k: v for k, v in steps[line["step"]].items() if not k.startswith("time/")
        }
    for name in ("model/model.safetensors", "checkpoints/step-4/training/optimizer.safetensors"):
        weights = load_file(run_folder / name)
        expected_weights = load_file(expected / name)
        assert weights.keys() == expected_weights.keys() and weights
        assert all(bool((weights[key] == expected_weights[key]).all()) for key in weights), name


@pytest.mark.parametrize(
    ("backend", "single_process"),
    [("ddp", "untied"), ("fsdp2", "tied"), ("zero2", "untied"), ("zero3", "tied")],
    indirect=["single_process"],
)
def test_the_trajectory_of_one_process(backend: str, single_process: Path, tmp_path: Path) -> None:
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install rltrain[deepspeed])")
    engaged = launch(backend, tmp_path, single_process)
    assert len(engaged) == 6 and all(run["ranks"] == 2 for run in engaged)
    for run in engaged:
        # ZeRO-3 leaves an empty tensor in place of a weight, FSDP2 a DTensor, the others whole parameters
        match backend:
            case "ddp":
                assert "DistributedDataParallel" in run["policy"]
            case "fsdp2":
                assert "FSDPModule" in run["policy"] and run["parameter"] == "DTensor"
            case "zero2":
                assert "DeepSpeedEngine" in run["policy"] and run["stage"] == 2 and run["elements"] > 0
            case "zero3":
                assert "DeepSpeedEngine" in run["policy"] and run["stage"] == 3 and run["elements"] == 0
    assert_close(tmp_path / "whole", single_process / "whole")
    assert_equal(tmp_path / "resumed", tmp_path / "whole")
    assert_close(tmp_path / "taken_over", single_process / "whole", first=2)
