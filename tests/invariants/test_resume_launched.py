"""Runs that ``accelerate launch`` started: what SIGTERM makes of them, and that they go on as if never
stopped, bit for bit.

What the launcher itself returns is its own affair: with one process it dies of the signal, with several it
exits with 1 whatever its ranks say. What these said is in a file of each.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.train.saving import STOPPED
from support.launch import run_ranks
from support.resumed_runs import SETTINGS, SEVENS, assert_same_run, lines
from support.warm import own_environment

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    1: ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    2: ["--config_file", "recipes/accelerate/ddp.yaml", "--num_processes", "2", "--main_process_port", "0"],
}
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Launched:
    """A launcher at work, in a session of its own."""

    run: Path
    codes: Path
    process: subprocess.Popen[str]

    def wait_for_a_step(self) -> None:
        metrics = self.run / "metrics.jsonl"
        while self.process.poll() is None and not (
            metrics.exists() and metrics.read_bytes().count(b"\n") > 0
        ):
            time.sleep(0.01)

    def printed(self) -> str:
        """By the launcher and all it started, once they have ended."""
        text, _ = self.process.communicate(timeout=300)
        return " ".join(text.split())

    def exit_codes(self) -> dict[str, int]:
        """Of each rank."""
        return {path.name: int(path.read_text()) for path in self.codes.iterdir()}


@pytest.fixture
def words(random_model: str) -> Callable[..., list[str]]:
    """``words(run, "a.b=1")``: what follows ``rltrain``."""

    def call(run: Path, *overrides: str) -> list[str]:
        settings = [f"model.path={random_model}", f"reward.functions=['{SEVENS}']", *SETTINGS, *overrides]
        command = ["train", "recipes/policy/grpo.yaml", "--profile", "tiny_cpu", "--run", str(run)]
        return command + [word for setting in settings for word in ("--set", setting)]

    return call


@pytest.fixture
def launch(words: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Launched]:
    """``launch(processes, run, "a.b=1")``"""

    def call(processes: int, run: Path, *overrides: str) -> Launched:
        codes = tmp_path / f"codes-{len(list(tmp_path.glob('codes-*')))}"
        codes.mkdir()
        script = [str(Path(__file__).with_name("noted_exit.py")), str(codes)]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHERS[processes]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(
            [*launcher, *script, *words(run, *overrides)],
            cwd=ROOT,
            env=own_environment(),
            start_new_session=True,
            **pipes,
        )
        return Launched(run, codes, process)

    return call


@pytest.fixture
def finish(words: Callable[..., list[str]]) -> Callable[..., str]:
    """``finish(processes, run, "a.b=1")``: what a run printed that ended well. It has the launcher's
    environment, and no launcher.
    """

    def call(processes: int, run: Path, *overrides: str) -> str:
        return run_ranks("ddp", ["-m", "rltrain", *words(run, *overrides)], ranks=processes)

    return call


def assert_finished(launched: Launched, ranks: int) -> str:
    printed = launched.printed()
    assert launched.process.returncode == 0, printed[-3000:]
    assert launched.exit_codes() == {str(rank): 0 for rank in range(ranks)}
    return printed


def test_one_process_is_stopped_with_its_launcher_and_goes_on(
    launch: Callable[..., Launched], finish: Callable[..., str], tmp_path: Path
) -> None:
    stopped = launch(1, tmp_path / "stopped")
    stopped.wait_for_a_step()
    stopped.process.send_signal(signal.SIGTERM)  # the launcher dies of it and passes nothing on
    assert "stopped by SIGTERM after step" in stopped.printed()
    assert stopped.process.returncode == -signal.SIGTERM and stopped.exit_codes() == {"0": STOPPED}
    [(step, _)] = RunFolder(tmp_path / "stopped").present_checkpoints()
    assert step == lines(tmp_path / "stopped")[-1]["step"] and not (tmp_path / "stopped/model").exists()
    finish(1, tmp_path / "whole")
    assert "continuing from" in assert_finished(launch(1, tmp_path / "stopped"), 1)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_two_ranks_are_stopped_by_their_launcher_and_go_on(
    launch: Callable[..., Launched], finish: Callable[..., str], tmp_path: Path
) -> None:
    stopped = launch(2, tmp_path / "stopped")
    stopped.wait_for_a_step()
    stopped.process.send_signal(signal.SIGTERM)  # the launcher passes it on to both
    assert "stopped by SIGTERM after step" in stopped.printed()
    assert stopped.process.returncode == 1 and stopped.exit_codes() == {"0": STOPPED, "1": STOPPED}
    [(step, _)] = RunFolder(tmp_path / "stopped").present_checkpoints()
    assert step == lines(tmp_path / "stopped")[-1]["step"] and not (tmp_path / "stopped/model").exists()
    finish(2, tmp_path / "whole")
    assert "continuing from" in assert_finished(launch(2, tmp_path / "stopped"), 2)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert "already finished" in finish(2, tmp_path / "stopped")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_at_the_terminal_of_a_launcher_is_one_stop(
    ranks: int, launch: Callable[..., Launched], tmp_path: Path
) -> None:
    # the terminal signals every process of the group; the launcher's way of passing it on is a second signal
    # within moments
    stopped = launch(ranks, tmp_path / "stopped")
    stopped.wait_for_a_step()
    os.killpg(stopped.process.pid, signal.SIGINT)
    printed = stopped.printed()
    assert stopped.exit_codes() == {str(rank): STOPPED for rank in range(ranks)}, printed[-3000:]
    assert "after step" in printed and "continue with: accelerate launch ... -m rltrain train" in printed
    [(step, _)] = RunFolder(tmp_path / "stopped").present_checkpoints()
    assert step == lines(tmp_path / "stopped")[-1]["step"]


@pytest.mark.vllm
def test_two_ranks_with_real_vllm_go_on_as_if_never_stopped(
    finish: Callable[..., str], tmp_path: Path
) -> None:
    apart, together, resumed = (tmp_path / name for name in ("apart", "together", "resumed"))
    shared = ("rollout.engine=vllm", "rollout.vllm.tensor_parallel=2")  # one engine on both ranks
    finish(2, apart, "rollout.engine=vllm")
    finish(2, together, *shared)
    steps, expected = ([line for line in lines(run) if "reward/mean" in line] for run in (together, apart))
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line, want in zip(steps, expected, strict=True):
        for name in ("reward/mean", "learner/grad_norm", "loss/total"):
            assert line[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), (line["step"], name)
    # what a machine that went down before the second checkpoint leaves: its reports know more
    shutil.copytree(together, resumed)
    for made_later in (resumed / "checkpoints/step-6", resumed / "model"):
        shutil.rmtree(made_later)
    assert [step for step, _ in RunFolder(resumed).present_checkpoints()] == [3] and lines(resumed)[-1][
        "step"
    ] == 6
    assert "continuing from" in finish(2, resumed, *shared)
    assert_same_run(together, resumed)
