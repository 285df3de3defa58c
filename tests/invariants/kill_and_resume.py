"""Kills training runs without warning and restarts them, until enough runs were killed and the last one
finished.

    python kill_and_resume.py FOLDER KILLS OVERRIDE...

FOLDER/whole is a run that is not killed. Every start is a fork of this process, which has imported all
modules already and starts no threads. A run is killed at a seeded random moment, or during a save: after the
temporary folder of a checkpoint has appeared. With the engine vllm, whose start takes longer than all steps,
the moment is after the first step. No process that a run has started may outlive it. The last line of the
output is JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # otherwise the optimizer imports it in every fork
from transformers import Qwen2ForCausalLM, Qwen2TokenizerFast  # noqa: F401  (for the same reason)

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import read_verified
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check

ROOT = Path(__file__).parents[2]


def start_run(folder: Path, overrides: list[str]) -> int:
    """Process id of a run in ``folder``, which leads its own session."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        recipe = check(
            load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)
        ).recipe
        code = train_command(recipe, folder, [])
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(child: int, options: int = 0) -> int | None:
    """Exit code, negative for a signal; None if the child still runs and ``options`` say not to wait."""
    done, status = os.waitpid(child, options)
    return os.waitstatus_to_exitcode(status) if done else None


class Process(NamedTuple):
    """Facts from /proc/ID/stat. A number that is used again has another start."""

    number: int
    parent: int
    session: int
    start: int


def running_processes() -> set[Process]:
    processes = set[Process]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent, _, session, *more = stat.read_text().rpartition(")")[2].split()
            if state != "Z":
                processes.add(Process(int(stat.parent.name), int(parent), int(session), int(more[15])))
    return processes


def run_processes(child: int) -> set[Process]:
    """The run with the rest of its session and all descendants (reward workers lead their own sessions)."""
    running = running_processes()
    processes = {process for process in running if process.session == child}
    while True:
        numbers = {process.number for process in processes}
        children = {process for process in running - processes if process.parent in numbers}
        if not children:
            return processes
        processes |= children


def assert_nothing_left(child: int, running: set[Process], seconds: float = 10.0) -> None:
    """Gives workers ``seconds`` to end.

    An orphan has another parent by now, so its number and start identify it.
    """
    starts = {(process.number, process.start) for process in running}
    end = time.monotonic() + seconds

    def find_survivors() -> list[int]:
        return [
            process.number
            for process in running_processes()
            if process.session == child or (process.number, process.start) in starts
        ]

    while (survivors := find_survivors()) and time.monotonic() < end:
        time.sleep(0.05)
    commands = [
        Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ")[:200] for number in survivors
    ]
    assert not survivors, f"{seconds} s after its end a run still has the processes {commands}"


@dataclass
class Clock:
    """Seconds since the start of the run, or since it reported its first step."""

    metrics: Path
    from_first_step: bool
    start: float = field(default_factory=time.monotonic)
    least: float = math.inf  # bytes: a resumed run first drops the lines after its checkpoint

    def read(self) -> float:
        """Seconds; negative before the first step."""
        if self.from_first_step:
            self.least = min(self.least, self.size())
            if self.size() <= self.least:
                return -1.0
            self.from_first_step = False
            self.start = time.monotonic()
        return time.monotonic() - self.start

    def size(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0


@dataclass(frozen=True)
class Kill:
    """A kill at ``moment`` seconds of the clock, or with within_save ``delay`` seconds after a checkpoint's
    folder appears.
    """

    moment: float
    within_save: bool
    delay: float


def kill_run(child: int, folder: Path, clock: Clock, kill: Kill) -> tuple[int, bool]:
    """(Number of processes that the kill ended, 0 if the run ended before it; whether it left a half-written
    checkpoint.)
    """
    old_saves = set((folder / "checkpoints").glob(".*.tmp"))
    while (code := exit_code(child, os.WNOHANG)) is None:
        saving = set((folder / "checkpoints").glob(".step-*.tmp")) - old_saves
        if saving if kill.within_save else clock.read() > kill.moment:
            time.sleep(kill.delay if kill.within_save else 0)
            running = run_processes(child)
            os.kill(child, signal.SIGKILL)
            was_killed = exit_code(child) == -signal.SIGKILL
            assert_nothing_left(child, running)
            half_written = set((folder / "checkpoints").glob(".step-*.tmp")) - old_saves
            return len(running) * was_killed, bool(half_written)
        time.sleep(0.0005)
    assert code == 0, f"the run in {folder} ended with {code}"
    return 0, False


def measure_run(folder: Path, overrides: list[str], from_first_step: bool) -> float:
    """Seconds that a run takes if it is not killed, or only those from its first step to its last."""
    child = start_run(folder, overrides)
    clock = Clock(folder / "metrics.jsonl", from_first_step)
    length = 0.0
    lines = 0
    running = set[Process]()
    while (code := exit_code(child, os.WNOHANG)) is None:
        now = clock.read()
        if now >= 0 and clock.size() > lines:
            length = now
            lines = clock.size()
            running = run_processes(child)
        time.sleep(0.001)
    assert code == 0, f"the run in {folder} ended with {code}"
    assert_nothing_left(child, running)
    return length if from_first_step else clock.read()


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    kill_count = int(sys.argv[2])
    overrides = sys.argv[3:]
    slow_start = "rollout.engine=vllm" in overrides
    if slow_start:
        import vllm  # noqa: F401  (for every fork)
    draw = random.Random(0)
    start = time.monotonic()
    length = measure_run(out / "whole", overrides, slow_start)
    kills = list[dict[str, Any]]()
    half_written = 0
    runs = [out / "run-0"]
    while len(kills) < kill_count or not half_written:
        folder = runs[-1]
        # there are few kills, and each must find the run still going
        longest = length / kill_count if slow_start else length
        kill = Kill(draw.uniform(0, longest), len(kills) % 2 == 1, draw.uniform(0, 0.03))
        clock = Clock(folder / "metrics.jsonl", slow_start)
        processes, half = kill_run(start_run(folder, overrides), folder, clock, kill)
        half_written += half
        kills += [{**asdict(kill), "processes": processes}] if processes else []
        for _, path in RunFolder(folder).present_checkpoints():
            read_verified(path)  # every folder with a checkpoint's name is a complete checkpoint
        if (folder / "model").exists():
            runs.append(out / f"run-{len(runs)}")
    measure_run(runs[-1], overrides, slow_start)
    seconds = round(time.monotonic() - start, 1)
    report = {
        "kills": kills,
        "in_a_save": half_written,
        "finished": [str(folder) for folder in runs],
        "seconds": seconds,
    }
    sys.stdout.write(json.dumps(report) + "\n")


main()
