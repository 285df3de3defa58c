"""Kills training runs without warning and starts them again, until enough were killed and the last one
finished.

    python kill_and_resume.py FOLDER KILLS OVERRIDE...

FOLDER/whole becomes a run nobody killed. Every start is a fork of this process, which has imported everything
already and starts no threads. A run is killed at a seeded random moment, or within a save: once the folder
that a checkpoint is made in is seen. With the engine vllm, whose start takes longer than all steps, the
moment is one of the time after the first of them. Nothing that a run had started may outlive it. The last
line written is JSON.
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
import torch._dynamo  # the optimizer would import it in every fork
from transformers import Qwen2ForCausalLM, Qwen2TokenizerFast  # noqa: F401  (the same)

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import read_verified
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check

ROOT = Path(__file__).parents[2]


def started(folder: Path, overrides: list[str]) -> int:
    """The process id of a run in ``folder``, which leads a session of its own."""
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
    """Negative for a signal; None while it runs and ``options`` say not to wait."""
    done, status = os.waitpid(child, options)
    return os.waitstatus_to_exitcode(status) if done else None


class Process(NamedTuple):
    """Of /proc/ID/stat. A number that is given again has another start."""

    number: int
    parent: int
    session: int
    start: int


def alive() -> set[Process]:
    found = set[Process]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent, _, session, *more = stat.read_text().rpartition(")")[2].split()
            if state != "Z":
                found.add(Process(int(stat.parent.name), int(parent), int(session), int(more[15])))
    return found


def family(child: int) -> set[Process]:
    """The run, what it started, what that started (reward workers lead sessions of their own), and
    the rest of its session.
    """
    everyone = alive()
    found = {one for one in everyone if one.session == child}
    while more := {one for one in everyone - found if one.parent in {known.number for known in found}}:
        found |= more
    return found


def assert_nothing_left(child: int, running: set[Process], seconds: float = 10.0) -> None:
    """A moment for workers to see that nobody needs them any more; who lost its parent has another
    one now.
    """
    starts, end = {(one.number, one.start) for one in running}, time.monotonic() + seconds
    while (
        left := [one.number for one in alive() if one.session == child or (one.number, one.start) in starts]
    ) and time.monotonic() < end:
        time.sleep(0.05)
    commands = [Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ")[:200] for one in left]
    assert not left, f"{seconds} s after its end a run still has the processes {commands}"


@dataclass
class Clock:
    """Seconds since the run began, or since it reported a step of its own."""

    metrics: Path
    from_first_step: bool
    began: float = field(default_factory=time.monotonic)
    least: float = math.inf  # bytes: a resumed run first drops what the checkpoint does not know of

    def read(self) -> float:
        """Below 0 before the first step."""
        if self.from_first_step:
            self.least = min(self.least, self.size())
            if self.size() <= self.least:
                return -1.0
            self.from_first_step, self.began = False, time.monotonic()
        return time.monotonic() - self.began

    def size(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0


@dataclass(frozen=True)
class Kill:
    """moment: seconds of ``clock``; within_save: instead of it, ``delay`` seconds after a
    checkpoint's folder is seen.
    """

    moment: float
    within_save: bool
    delay: float


def killed(child: int, folder: Path, clock: Clock, kill: Kill) -> tuple[int, bool]:
    """(how many processes a kill ended, 0 where the run ended before it; whether it left a
    half-written checkpoint).
    """
    left = set((folder / "checkpoints").glob(".*.tmp"))
    while (code := exit_code(child, os.WNOHANG)) is None:
        saving = set((folder / "checkpoints").glob(".step-*.tmp")) - left
        if saving if kill.within_save else clock.read() > kill.moment:
            time.sleep(kill.delay if kill.within_save else 0)
            running = family(child)
            os.kill(child, signal.SIGKILL)
            dead = exit_code(child) == -signal.SIGKILL
            assert_nothing_left(child, running)
            return len(running) * dead, bool(set((folder / "checkpoints").glob(".step-*.tmp")) - left)
        time.sleep(0.0005)
    assert code == 0, f"the run in {folder} ended with {code}"
    return 0, False


def length_of(folder: Path, overrides: list[str], from_first_step: bool) -> float:
    """Seconds that a run takes which nobody kills, or only those from its first step to its last."""
    child, clock, length, lines = (
        started(folder, overrides),
        Clock(folder / "metrics.jsonl", from_first_step),
        0.0,
        0,
    )
    running = set[Process]()
    while (code := exit_code(child, os.WNOHANG)) is None:
        now = clock.read()
        if now >= 0 and clock.size() > lines:
            length, lines, running = now, clock.size(), family(child)
        time.sleep(0.001)
    assert code == 0, f"the run in {folder} ended with {code}"
    assert_nothing_left(child, running)
    return length if from_first_step else clock.read()


def main() -> None:
    torch.set_num_threads(1)
    out, wanted, overrides = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    slow_start = "rollout.engine=vllm" in overrides
    if slow_start:
        import vllm  # noqa: F401  (for every fork)
    draw = random.Random(0)
    began = time.monotonic()
    length = length_of(out / "whole", overrides, slow_start)
    kills, half_written, runs = list[dict[str, Any]](), 0, [out / "run-0"]
    while len(kills) < wanted or not half_written:
        folder = runs[-1]
        longest = (
            length / wanted if slow_start else length
        )  # few kills, each of which is to find the run going on
        kill = Kill(draw.uniform(0, longest), len(kills) % 2 == 1, draw.uniform(0, 0.03))
        clock = Clock(folder / "metrics.jsonl", slow_start)
        processes, half = killed(started(folder, overrides), folder, clock, kill)
        half_written += half
        kills += [{**asdict(kill), "processes": processes}] if processes else []
        for _, path in RunFolder(folder).present_checkpoints():
            read_verified(path)  # whatever is there under a checkpoint's name is whole
        if (folder / "model").exists():
            runs.append(out / f"run-{len(runs)}")
    length_of(runs[-1], overrides, slow_start)
    seconds = round(time.monotonic() - began, 1)
    report = {
        "kills": kills,
        "in_a_save": half_written,
        "finished": [str(folder) for folder in runs],
        "seconds": seconds,
    }
    sys.stdout.write(json.dumps(report) + "\n")


main()
