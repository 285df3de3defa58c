"""A run that is stopped and continued is the run that was never stopped: weights, optimizer,
generators and metrics, bit for bit.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import is_sharded, read_verified
from rltrain.cli import train as commands
from rltrain.errors import UserError
from rltrain.train import online, saving
from rltrain.train.saving import STOPPED
from support.resumed_runs import (
    SETTINGS,
    SEVENS,
    assert_same_run,
    at_call,
    differing,
    killed_in,
    lines,
    train_here,
)

ROOT = Path(__file__).parents[2]
NEEDS_8_BITS = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def start(random_model: str) -> Callable[..., int]:
    """``start(folder, "a.b=1", resume=...)`` runs ``rltrain train`` in this process."""
    return functools.partial(train_here, random_model)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("killed", "settings"),
    [
        pytest.param(5, [], id="after a checkpoint"),
        pytest.param(5, ["checkpoint.format=sharded"], id="after a sharded checkpoint"),
        pytest.param(
            5,
            ["learner.optimizer.name=adamw_8bit"],
            id="moments of 8 bits",
            marks=[
                pytest.mark.slow,
                NEEDS_8_BITS,
            ],
        ),
        pytest.param(2, [], id="before the first checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    killed: int, settings: list[str], start: Any, tmp_path: Path
) -> None:
    assert start(tmp_path / "whole", *settings) == 0
    killed_in(killed, online, "apply_methods", lambda: start(tmp_path / "resumed", *settings))
    assert lines(tmp_path / "resumed")[-1]["step"] == killed - 1  # more than the checkpoint knows of
    assert start(tmp_path / "resumed", *settings) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert is_sharded(tmp_path / "whole/checkpoints/step-6") == ("checkpoint.format=sharded" in settings)


@pytest.mark.slow
def test_a_resumed_run_of_episodes_goes_on_at_the_adapted_temperature(start: Any, tmp_path: Path) -> None:
    environments = ROOT / "tests/support/environments.py"
    turns = "turns: 2, max_turns: 3, turn_tokens: 4, workers: 1"
    environment = f"rollout.environment={{name: '{environments}:Counting', {turns}}}"
    settings = ("rollout.adaptive_temperature={tau: 0.5}", environment, "rollout.max_tokens=32")
    assert start(tmp_path / "whole", *settings) == 0
    killed_in(5, online, "apply_methods", lambda: start(tmp_path / "resumed", *settings))
    assert start(tmp_path / "resumed", *settings) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    lines_of_steps = [line for line in lines(tmp_path / "whole") if "rollout/turns_mean" in line]
    assert {line["rollout/turns_mean"] for line in lines_of_steps} == {2.0}
    # the first step samples at the base
    assert ["control/temperature_sigma" in line for line in lines_of_steps] == [False] + [True] * 5
    # engine and learner agree at the base temperature
    assert max(line["rollout/mismatch_abs"] for line in lines_of_steps) < 1e-4


@pytest.mark.nightly
@pytest.mark.vllm
@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_run_with_real_vllm(start: Any, tmp_path: Path) -> None:
    assert start(tmp_path / "whole", "rollout.engine=vllm") == 0
    killed_in(5, online, "apply_methods", lambda: start(tmp_path / "resumed", "rollout.engine=vllm"))
    assert start(tmp_path / "resumed", "rollout.engine=vllm") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("times", [1, pytest.param(2, id="and once more by way of the launcher")])
def test_sigterm_saves_and_exits_with_3(times: int, start: Any, tmp_path: Path) -> None:
    def terminate() -> None:
        for _ in range(times):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # else the next line ends the tests
            signal.raise_signal(signal.SIGTERM)

    with at_call(2, online, "apply_methods", terminate):
        # neither 143, which is a process that just died, nor 75 of a deadline
        assert start(tmp_path / "stopped") == STOPPED == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # what it was
    assert lines(tmp_path / "stopped")[-1]["step"] == 2  # the step in hand was finished
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-2"]
    assert start(tmp_path / "stopped") == 0
    assert start(tmp_path / "whole") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_sigterm_that_is_certainly_another_one_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(saving, "_REPEAT_SECONDS", 0.02)
    with saving.record_stop_signals() as request, monkeypatch.context() as patch:
        patch.setattr(saving.os, "kill", lambda *to: sent.append(to))
        signal.raise_signal(signal.SIGTERM)
        assert request() and not sent
        time.sleep(0.03)
        signal.raise_signal(signal.SIGTERM)
        assert sent == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_saves_and_says_how_to_go_on(
    start: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        sys, "argv", ["rltrain", "train", "my recipe.yaml", "--resume", "old/step-1", "--run", "new"]
    )
    with at_call(2, online, "apply_methods", lambda: signal.raise_signal(signal.SIGINT)):
        assert start(tmp_path / "stopped") == STOPPED
    assert signal.getsignal(signal.SIGINT) is handler
    printed = capfd.readouterr()
    assert (
        "Ctrl-C: the run stops after the step in hand and writes a checkpoint, from which the same command "
        "continues; a second Ctrl-C ends it at once, back at the last checkpoint" in printed.err
    )
    said = " ".join(printed.out.split())
    assert "stopped by Ctrl-C after step 2" in said
    # from its own checkpoint, not from the old one
    assert "continue with: rltrain train 'my recipe.yaml' --run new" in said
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("metrics.jsonl: line 3 is no JSON")],
)
def test_a_report_that_cannot_be_written_changes_no_exit_code(
    error: Exception,
    start: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuses(*_: Any) -> None:
        raise error

    monkeypatch.setattr(commands, "write_report", refuses)
    with at_call(1, online, "apply_methods", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert start(tmp_path / "stopped", "data.eval=null", "loss.terms=[]") == STOPPED
    assert read_verified(tmp_path / "stopped/checkpoints/step-1").step == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "report.html is not written" in printed and "stopped by SIGTERM after step 1" in printed


def test_a_finished_run_without_a_report_is_finished(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any) -> None:
        raise ValueError("run.html.j2: no such value")

    monkeypatch.setattr(commands, "write_report", refuses)
    assert start(tmp_path / "run", "data.eval=null", "loss.terms=[]", "train.steps=1") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "report.html is not written: run.html.j2" in printed and (tmp_path / "run/model").is_dir()
    assert "report " not in printed.partition("model  ")[2]


def test_a_run_goes_on_with_another_deadline_and_other_workers_in_the_same_numbers(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "whole") == 0
    killed_in(5, online, "apply_methods", lambda: start(tmp_path / "resumed"))
    other = (
        "train.deadline_seconds=3600",
        "reward.workers=2",
        "checkpoint.every=2",
        "rollout.mismatch_warn=0.5",
        "report.project=other",
    )
    assert start(tmp_path / "resumed", *other) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "none of its numbers depends" in printed and "train.deadline_seconds: 1800.0 -> 3600.0, " in printed
    )
    assert "reward.workers: 1 -> 2" in printed
    assert lines(tmp_path / "whole") == lines(tmp_path / "resumed")
    saved = "checkpoints/step-6"
    assert not differing(
        *(tmp_path / run for run in ("whole", "resumed")),
        "model/model.safetensors",
        f"{saved}/model.safetensors",
    )
    assert not differing(
        *(tmp_path / run for run in ("whole", "resumed")), f"{saved}/training/optimizer.safetensors"
    )
    assert start(tmp_path / "resumed", "train.deadline_seconds=60") == 0  # nothing is done again for it
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_longer_run_is_the_run_that_was_long_from_the_start(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = "learner.optimizer.schedule=constant"
    assert start(tmp_path / "run", constant, "train.steps=3") == 0
    before = contents(tmp_path / "run")
    assert start(tmp_path / "run", constant, "train.steps=3") == 0
    assert "already finished" in capsys.readouterr().out.splitlines()[-1]
    assert contents(tmp_path / "run") == before
    assert start(tmp_path / "run", constant) == 0
    assert start(tmp_path / "whole", constant) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run/model-step-3/model.safetensors").read_bytes() == before["model/model.safetensors"]

    for overrides, said in (
        ((constant, "train.steps=3"), "a run can be made longer, not shorter"),
        (("train.steps=9",), 'learner.optimizer.schedule: "constant" -> "cosine"'),
        ((constant, "learner.optimizer.lr=1e-3", "seed=7"), "learner.optimizer.lr: 0.002 -> 0.001"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            start(tmp_path / "run", *overrides)


def test_a_cosine_run_is_not_made_longer(start: Any, tmp_path: Path) -> None:
    assert start(tmp_path / "run", "train.steps=1", "eval.at_start=false", "checkpoint.every=1") == 0
    with pytest.raises(UserError, match="the steps taken had a cosine schedule that ends at 1"):
        start(tmp_path / "run", "train.steps=2", "eval.at_start=false", "checkpoint.every=1")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = "checkpoint.every=2"
    assert start(tmp_path / "whole", every) == 0
    killed_in(6, online, "apply_methods", lambda: start(tmp_path / "run", every))
    with open(tmp_path / "run/checkpoints/step-4/training/optimizer.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert start(tmp_path / "run", every) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "optimizer.safetensors is not what was written (its SHA-256 differs)" in printed
    assert "step-4 is not used and now called unused-step-4" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "run")

    with pytest.raises(UserError, match="model but no training state"):
        start(tmp_path / "new", every, resume=str(tmp_path / "run/model"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_named_checkpoint_is_gone_back_to_or_continued_elsewhere(start: Any, tmp_path: Path) -> None:
    every = "checkpoint.every=2"
    assert start(tmp_path / "whole", every) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    assert start(tmp_path / "run", every, resume=str(tmp_path / "run/checkpoints/step-2")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert start(tmp_path / "fork", every, resume=str(tmp_path / "whole/checkpoints/step-4")) == 0
    assert lines(tmp_path / "fork") == [line for line in lines(tmp_path / "whole") if line["step"] > 4]
    with pytest.raises(UserError, match="holds a run of its own"):
        start(tmp_path / "run", every, resume=str(tmp_path / "whole/checkpoints/step-4"))
    with pytest.raises(UserError, match="already holds a run"):
        start(tmp_path / "run", every, resume="never")


def test_two_processes_never_train_in_one_folder(start: Any, tmp_path: Path) -> None:
    killed_in(2, online, "apply_methods", lambda: start(tmp_path / "run"))
    before = contents(tmp_path / "run")
    with (
        RunFolder(tmp_path / "run").lock(),
        pytest.raises(UserError, match="another process is training in it"),
    ):
        start(tmp_path / "run")
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_other_prompts_are_refused(start: Any, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"<user>{number}+1=<assistant>", "answer": str(number + 1)} for number in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"data.train={data}",
        "data.options={}",
        "data.eval=null",
        "data.max_prompts=null",
        "checkpoint.every=1",
    )
    killed_in(3, online, "apply_methods", lambda: start(tmp_path / "run", *settings))
    data.write_text(data.read_text().replace("19+1=", "18+2="))
    with pytest.raises(UserError, match=r"column prompt of data\.train"):
        start(tmp_path / "run", *settings)


@pytest.mark.slow
@pytest.mark.parametrize(("size_kib", "form"), [(4096, "whole"), (6144, "whole"), (6144, "sharded")])
def test_a_full_disk_is_one_clear_error_and_costs_no_checkpoint(
    size_kib: int, form: str, start: Any, tmp_path: Path
) -> None:
    # The tiny model takes some 0.8 MB and its optimizer twice that: the disk is full in the first checkpoint
    # or in a later one.
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(reason=f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match=r"No space left.*(is whole and stays|no checkpoint yet)"):
            start(disk / "run", "checkpoint.every=1", f"checkpoint.format={form}")
        folder = RunFolder(disk / "run")
        assert not folder.model.exists() and not list(folder.checkpoints.glob(".*"))
        for _, path in folder.present_checkpoints():
            read_verified(path)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert start(disk / "run", "checkpoint.every=1", f"checkpoint.format={form}") == 0
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert start(tmp_path / "whole", "checkpoint.every=1", f"checkpoint.format={form}") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EIO], ids=["read-only", "full", "broken"])
def test_a_disk_that_refuses_to_sync_leaves_the_last_checkpoint(
    code: int, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuses(descriptor: int) -> None:
        if ".step-2." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    settings = ("checkpoint.every=1", "train.steps=2")
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=rf"{re.escape(os.strerror(code))}.*step-1 is whole and stays"),
    ):
        patch.setattr(os, "fsync", refuses)
        start(tmp_path / "run", *settings)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-1"]
    assert start(tmp_path / "run", *settings) == 0


def killed_again_and_again(kills: int, folder: Path, *settings: str) -> dict[str, Any]:
    """The report of ``kill_and_resume.py``; compares its runs in ``folder`` with the one not killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), str(folder), str(kills), *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sys.stdout.write(done.stdout.splitlines()[-1] + "\n")  # the moments of the kills, for the log
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["kills"]) >= kills and report["finished"], report
    # a reward worker at least: something could have been left
    assert max(kill["processes"] for kill in report["kills"]) > 1, report
    for finished in map(Path, report["finished"]):
        assert_same_run(folder / "whole", finished)
    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kills"), [("whole", 8), ("sharded", 8), pytest.param("whole", 40, marks=pytest.mark.nightly)]
)
def test_kills_end_in_the_same_weights(form: str, kills: int, random_model: str, tmp_path: Path) -> None:
    quick = ("checkpoint.every=1", "checkpoint.keep=2", "loss.terms=[]", "data.eval=null", "eval.every=0")
    model = (f"model.path={random_model}", f"reward.functions=['{SEVENS}']")
    # in parts, the samples are those of the weights one step before: what was sampled ahead is in the journal
    ahead = ("rollout.schedule={lag: 1}", "control=[tis]") if form == "sharded" else ()
    settings = (*model, *SETTINGS, *quick, *ahead)
    report = killed_again_and_again(kills, tmp_path, *settings, f"checkpoint.format={form}")
    assert report["in_a_save"] >= kills // 4, report


@pytest.mark.nightly
@pytest.mark.vllm
@pytest.mark.slow
def test_kills_with_real_vllm_end_in_the_same_weights(random_model: str, tmp_path: Path) -> None:
    quick = (
        "checkpoint.every=1",
        "checkpoint.keep=2",
        "loss.terms=[]",
        "data.eval=null",
        "eval.every=0",
        "rollout.engine=vllm",
    )
    report = killed_again_and_again(
        2, tmp_path, f"model.path={random_model}", f"reward.functions=['{SEVENS}']", *SETTINGS, *quick
    )
    assert report["in_a_save"] >= 1, report
