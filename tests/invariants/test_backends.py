"""One run distributed in five ways: each has the trajectory of one process, and any backend continues the
checkpoints of any other.

Accelerate reads the users' files (``support/launch.py``). On a machine without a GPU they run over gloo;
``learner/ranks.py`` ensures that FSDP2 and DeepSpeed really run there, and these tests inspect the prepared
model to verify it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.checkpoint.run_state import is_sharded, read_state
from rltrain.report.names import reproducible_metrics
from support.launch import run_ranks
from support.resumed_runs import assert_equal_tensors, differing
from support.trajectories import assert_close, metrics, overrides
from support.warm import run_program

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


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
    (folder / "overrides.json").write_text(json.dumps(settings))
    train_alone(folder, folder / "whole", "--set", "checkpoint.format=sharded")
    return folder


def train_alone(settings: Path, run: Path, *words: str) -> None:
    """Runs one process with the ``overrides.json`` in the folder ``settings``."""
    overrides = json.loads((settings / "overrides.json").read_text())
    command = [
        "-m",
        "rltrain",
        "train",
        "recipes/policy/grpo.yaml",
        "--profile",
        "tiny_cpu",
        "--run",
        str(run),
        *(word for setting in overrides for word in ("--set", setting)),
        *words,
    ]
    done = run_program(command)
    assert done.returncode == 0, done.stderr[-3000:]


def launch(
    backend: str, folder: Path, single_process: Path, offload: str = "nothing"
) -> list[dict[str, Any]]:
    """Runs ``two_ranks.py`` under ``recipes/accelerate/<backend>.yaml`` and returns facts about each rank's
    model, one entry per run.
    """
    settings = json.loads((single_process / "overrides.json").read_text())
    arguments = [
        str(Path(__file__).with_name("two_ranks.py")),
        str(folder),
        str(single_process / "whole/checkpoints/step-2"),
        offload,
        *settings,
    ]
    run_ranks(backend, arguments)
    return [run for rank in range(2) for run in json.loads((folder / f"engaged-{rank}.json").read_text())]


def assert_engaged(backend: str, run: dict[str, Any]) -> None:
    """ZeRO-3 leaves an empty tensor in place of a weight, FSDP2 a DTensor, the others whole parameters."""
    match backend:
        case "ddp":
            assert "DistributedDataParallel" in run["policy"]
        case "fsdp2":
            assert "FSDPModule" in run["policy"] and run["parameter"] == "DTensor"
        case "zero2":
            assert "DeepSpeedEngine" in run["policy"] and run["stage"] == 2 and run["elements"] > 0
        case "zero3":
            assert "DeepSpeedEngine" in run["policy"] and run["stage"] == 3 and run["elements"] == 0


def assert_no_second_model(run: dict[str, Any], *, is_writer: bool) -> None:
    """No rank holds more than two gathered tensors beside its shards; the writer also holds one file's."""
    streams = {"push", "save"} | (set() if run["saves_parts"] else {"optimizer"})  # parts are not gathered
    peaks = {stream: peak for stream, peak in run["peaks"].items() if peak}
    assert peaks.keys() == streams
    for stream in streams - ({"save", "optimizer"} if is_writer else set()):
        assert peaks[stream] <= 2, stream


def assert_equal(run_folder: Path, expected: Path) -> None:
    """Bit for bit: the metrics of the steps that both have, the weights, the optimizer's state, whether whole
    or in parts.
    """
    steps = {line["step"]: line for line in metrics(expected)}
    for line in metrics(run_folder):
        assert reproducible_metrics(line) == reproducible_metrics(steps[line["step"]])
    assert not differing(run_folder, expected, "model/model.safetensors")
    state, expected_state = (
        {
            name: tensor
            for name, tensor in read_state(run / "checkpoints/step-4").tensors.items()
            if not name.endswith("/master")
        }
        for run in (run_folder, expected)
    )
    assert_equal_tensors(state, expected_state)


@pytest.mark.parametrize(
    ("backend", "single_process"),
    [("ddp", "untied"), ("fsdp2", "tied"), ("zero2", "untied"), ("zero3", "tied")],
    indirect=["single_process"],
)
def test_the_trajectory_of_one_process(backend: str, single_process: Path, tmp_path: Path) -> None:
    engaged = launch(backend, tmp_path, single_process)
    assert len(engaged) == 8 and all(run["ranks"] == 2 for run in engaged)
    for run in engaged:
        assert_engaged(backend, run)
        if backend in ("fsdp2", "zero3"):
            assert_no_second_model(run, is_writer=run["rank"] == 0)
    assert_close(tmp_path / "whole", single_process / "whole")
    assert_equal(tmp_path / "resumed", tmp_path / "whole")
    assert_equal(tmp_path / "from_parts", tmp_path / "whole")
    assert_close(tmp_path / "taken_over", single_process / "whole", first=2)
    for name, form in (("whole", "whole"), ("resumed", "sharded"), ("from_parts", "whole")):
        assert is_sharded(tmp_path / name / "checkpoints/step-4") == (form == "sharded")
    if backend.startswith("zero"):  # two ranks' parts of flat memory, for one process
        checkpoint = str(tmp_path / "resumed/checkpoints/step-3")
        train_alone(single_process, tmp_path / "alone", "--resume", checkpoint)
        assert_close(tmp_path / "alone", single_process / "whole", first=3)


@pytest.mark.parametrize(
    ("backend", "single_process", "offload", "said"),
    [
        ("fsdp2", "tied", "all", ["CPUOffloadPolicy"]),
        ("zero2", "untied", "optimizer", ["cpu", "none"]),
        ("zero3", "tied", "all", ["cpu", "cpu"]),
    ],
    indirect=["single_process"],
)
def test_the_trajectory_of_one_process_with_weights_and_moments_on_the_host(
    backend: str, single_process: Path, offload: str, said: list[str], tmp_path: Path
) -> None:
    engaged = launch(backend, tmp_path, single_process, offload)
    assert [run["offload"] for run in engaged] == [said] * 4  # two runs on two ranks
    assert_close(tmp_path / "whole", single_process / "whole")
    assert_equal(tmp_path / "resumed", tmp_path / "whole")
