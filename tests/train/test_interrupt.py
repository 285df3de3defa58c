"""Ctrl-C: the end of whatever is not a training loop, at once and without a traceback; in a loop a
request, then the end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rltrain.analysis.compare_runs import run_command
from rltrain.cli import app as cli
from rltrain.interrupt import Interrupted, exit_on_ctrl_c, resuming_command
from rltrain.train import saving

LAUNCHER = 4711  # number of its process; a test's own parent may be 1

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Signals that this process would have sent itself."""
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *to: signals.append(to))
    return signals


@pytest.fixture
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)


RECIPE = [str(ROOT / "recipes/policy/grpo.yaml"), "--profile", "tiny_cpu"]
SMALL = [
    "--set",
    "rollout.prompts=2",
    "--set",
    "rollout.n=2",
    "--set",
    "eval.n=2",
    "--set",
    "eval.k=[1]",
    "--set",
    "model.path=MODEL",
]
COMMANDS = {
    "train": ["train", *RECIPE, "--run", "run", *SMALL],
    "eval": ["eval", "MODEL", "--recipe", *RECIPE, *SMALL],
    "generate": ["generate", "MODEL", "1+1="],
    "doctor": ["doctor", *RECIPE, *SMALL],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_while_weights_are_loaded_it_ends_with_a_line(
    name: str,
    sent: Any,
    random_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def pressed(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pressed)
    monkeypatch.setattr(
        sys, "argv", ["rltrain", *(word.replace("MODEL", random_model) for word in COMMANDS[name])]
    )
    handler = signal.getsignal(signal.SIGINT)
    cli.main()
    assert sent[-1] == (os.getpid(), signal.SIGINT)  # what a shell must see
    assert signal.getsignal(signal.SIGINT) is handler
    printed = capfd.readouterr().err
    assert "interrupted" in printed and "Traceback" not in printed
    assert not (tmp_path / "run/model").exists()


def test_a_process_that_starts_dies_of_the_signal_without_a_traceback(tmp_path: Path) -> None:
    # it reads its recipe from a pipe: opened for writing here as soon as it is opened for reading there
    os.mkfifo(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "rltrain", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "recipe.yaml", "w"):
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert printed.split() == ["interrupted"]


def test_a_background_job_stays_deaf(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    command = f"trap '' INT; exec {sys.executable} -m rltrain train {tmp_path / 'recipe.yaml'}"
    process = subprocess.Popen(["sh", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "recipe.yaml", "w") as recipe:
        process.send_signal(signal.SIGINT)
        recipe.write("nothing: here\n")
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2 and "nothing" in printed


@pytest.mark.usefixtures("not_launched")
def test_a_second_one_in_the_loop_ends_the_process_at_once(sent: Any) -> None:
    with saving.record_stop_signals() as request:
        request.in_loop = True
        signal.raise_signal(signal.SIGINT)
        assert request() and request.cause == "Ctrl-C" and not sent
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.usefixtures("not_launched")
@pytest.mark.parametrize("launcher", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_under_a_launcher_what_comes_within_moments_is_one(
    sent: Any, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launcher, "no")
    with saving.record_stop_signals() as request:
        request.in_loop = True
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert request() and not sent
        monkeypatch.setattr(saving, "_REPEAT_SECONDS", 0.0)
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGINT)]


@pytest.mark.usefixtures("not_launched")
def test_a_launcher_that_takes_its_time_to_end_asks_nothing_new(
    sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_REPEAT_SECONDS", 0.0)
    with saving.record_stop_signals() as request:
        request.in_loop = True
        request.parent = LAUNCHER
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(saving.os, "getppid", lambda: 1)  # whom orphans are given to
        signal.raise_signal(signal.SIGTERM)
        assert request() and request.cause == "Ctrl-C" and not sent
        signal.raise_signal(signal.SIGTERM)
        assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.usefixtures("not_launched")
def test_the_end_of_the_launcher_stops_a_run_that_nothing_stopped_before(
    sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saving.record_stop_signals() as request:
        request.parent = LAUNCHER
        monkeypatch.setattr(saving.os, "getppid", lambda: 1)
        signal.raise_signal(signal.SIGTERM)
        assert request() and request.cause == "SIGTERM" and not sent


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is of Linux")
def test_a_process_that_has_stopped_outlives_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def announced() -> int:
        number = ctypes.c_int(-1)
        assert ctypes.CDLL(None).prctl(2, ctypes.byref(number)) == 0  # PR_GET_PDEATHSIG
        return number.value

    before = announced()
    with saving.stop_with_the_launcher():
        assert announced() == before
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with saving.stop_with_the_launcher():
        assert announced() == signal.SIGTERM
    assert announced() == 0


@pytest.mark.usefixtures("not_launched")
def test_a_scheduler_announces_the_end_before_it_ends_the_job(
    sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 is no first request: the SIGTERM that follows must not cut the checkpoint off."""
    monkeypatch.setattr(saving, "_REPEAT_SECONDS", 0.0)
    with saving.record_stop_signals() as request:
        request.in_loop = True
        assert not request()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert request() and request.cause == "SIGUSR1"
        signal.raise_signal(signal.SIGTERM)
        assert not sent
        signal.raise_signal(signal.SIGTERM)
        assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_run_ends_while_another_step_still_fits() -> None:
    """The longest step so far, of 30 s, decides."""
    times = iter([100.0, 130.0, 140.0, 160.0, 171.0])
    request = saving.StopRequest(limit=saving.TimeLimit(100.0, started=90.0, clock=lambda: next(times)))
    assert [request() for _ in range(5)] == [False, False, False, False, True]
    assert request.cause == "train.max_hours"


def test_before_the_first_step_it_is_the_end() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted), saving.record_stop_signals():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_comparison_waits_for_the_checkpoint_of_its_run(tmp_path: Path) -> None:
    # the run ignores the signal, as one that saves does, and leaves its file a moment later
    child = (
        "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.6); "
        f"open({str(tmp_path / 'saved')!r}, 'w')"
    )
    with pytest.raises(Interrupted):
        run_command([sys.executable, "-c", child])
    assert (tmp_path / "saved").exists()


@pytest.mark.usefixtures("not_launched")
@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/x/bin/rltrain", "train", "a.yaml", "--resume=old"], "rltrain train a.yaml"),
        (
            ["/x/rltrain/__main__.py", "train", "a.yaml", "--set", "k=[1, 2]"],
            "python -m rltrain train a.yaml --set 'k=[1, 2]'",
        ),
        (["rltrain", "train", "a.yaml", "--resume", "auto", "--run", "r"], "rltrain train a.yaml --run r"),
    ],
)
def test_the_command_that_goes_on_begins_at_the_runs_own_checkpoint(
    arguments: list[str], command: str
) -> None:
    assert resuming_command(arguments) == command


def test_nothing_is_changed_for_whoever_is_not_interrupted() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with exit_on_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is not handler
    assert signal.getsignal(signal.SIGINT) is handler
