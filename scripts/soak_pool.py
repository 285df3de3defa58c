"""Trains a small model on two local workers, of which one is killed now and then, and keeps the curve.

    python scripts/soak_pool.py --hours 2 --model FOLDER --run runs/soak --json soak.json

A worker is killed only while both serve, so that a kill comes no sooner than the worker before is back. Ends
with 1 where the run did not end as it was told to, took no step after a kill, lost a worker that was not
killed, had one that was not back after ``--back-within``, or where its memory grew by more than a tenth in
the second half. Not part of any tier: by hand, at night.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

SERVER = "rltrain.rollout.worker.serve"
STOPPED = 3  # exit code of a run that train.max_hours ended
POLL_SECONDS = 1.0
SETTINGS = (
    "rollout.engine=vllm_server",
    "rollout.workers={count: 2}",
    "rollout.prompts=4",
    "rollout.n=4",
    "reward.workers=1",
    "train.steps=1000000",
    "eval.every=0",
    "eval.at_start=false",
    "checkpoint.every=100",
    "checkpoint.keep=2",
)
KEPT = ("step", "time/elapsed", "time/step", "reward/mean", "memory/process")


def find_workers(run: psutil.Process) -> list[psutil.Process]:
    """The servers' own processes below the run's."""
    workers: list[psutil.Process] = []
    for process in run.children(recursive=True):
        try:
            if SERVER in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                workers.append(process)
        except psutil.NoSuchProcess:
            continue
    return workers


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [line for line in lines if "time/step" in line]


def count(lines: list[dict[str, Any]], what: str) -> int:
    """Workers that were ``lost``, or that came back: ``restarts``."""
    return round(sum(line[f"pool/{what}"] for line in lines))


def soak(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs, kills, and returns the kills: the second, the steps taken until then, the seconds until the
    worker had its weights again (None: it had not, after as many seconds as "waited").
    """
    command = [sys.executable, "-m", "rltrain", "train", "recipes/policy/grpo.yaml", "--profile", "tiny_cpu"]
    settings = [*SETTINGS, f"train.max_hours={arguments.hours}"]
    settings += [] if arguments.model is None else [f"model.path={arguments.model}"]
    command += ["--run", str(arguments.run), *(part for each in settings for part in ("--set", each))]
    command += [part for each in arguments.set for part in ("--set", each)]
    metrics = arguments.run / "metrics.jsonl"
    chance = random.Random(0)
    kills: list[dict[str, Any]] = []
    start = time.monotonic()
    due: float | None = None
    with subprocess.Popen(command) as run:
        while run.poll() is None:
            time.sleep(POLL_SECONDS)
            second = round(time.monotonic() - start, 1)
            lines = read_lines(metrics)
            if kills:
                note_return(kills[-1], lines, second, len(kills))
            if due is None:  # the first kill comes after the first step
                due = second + arguments.kill_every if lines else None
            elif second > due and do_both_serve(kills, lines):
                workers = find_workers(psutil.Process(run.pid))
                if len(workers) == 2:
                    chance.choice(workers).kill()
                    kills.append({"second": second, "steps": len(lines), "back": None, "waited": 0.0})
                    due = second + arguments.kill_every
        if run.returncode != STOPPED:
            raise SystemExit(f"the run ended with exit code {run.returncode}; expected {STOPPED}")
    return kills


def do_both_serve(kills: list[dict[str, Any]], lines: list[dict[str, Any]]) -> bool:
    is_back = not kills or kills[-1]["back"] is not None
    return is_back and lines[-1]["pool/workers"] == 2


def note_return(kill: dict[str, Any], lines: list[dict[str, Any]], second: float, kills: int) -> None:
    """kills: until now, with this one. A worker that answers again has its weights after the next push."""
    if kill["back"] is None:
        kill["waited"] = round(second - kill["second"], 1)
        if count(lines, "restarts") >= kills and lines[-1]["pool/workers"] == 2:
            kill["back"] = kill["waited"]


def find_faults(lines: list[dict[str, Any]], kills: list[dict[str, Any]], longest: float) -> list[str]:
    """What the run should not have done. longest: seconds for a killed worker to come back, of which the end
    of the run may cut some off. The last kill may come too late for another step.
    """
    if not lines:
        return ["no step was taken"]
    faults = [
        f"no step after the kill at {kill['second']} s" for kill in kills[:-1] if kill["steps"] >= len(lines)
    ]
    faults += [
        f"the worker killed at {kill['second']} s was not back after {kill['waited']} s"
        for kill in kills
        if kill["back"] is None and kill["waited"] > longest
    ]
    if (lost := count(lines, "lost")) > len(kills):
        faults.append(f"{lost} workers were lost, and {len(kills)} killed")
    memory = [line["memory/process"] for line in lines]
    half = memory[len(memory) // 2 :]
    if len(half) > 10 and half[-1] > 1.1 * half[0]:
        faults.append(
            f"the learner's memory grew from {half[0]:.2f} to {half[-1]:.2f} GiB in the second half"
        )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--kill-every", type=float, default=600.0, help="seconds between kills")
    parser.add_argument("--back-within", type=float, default=600.0, help="seconds for a killed worker")
    parser.add_argument("--model", help="default: the recipe's")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="of the recipe")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    kills = soak(arguments)
    lines = read_lines(arguments.run / "metrics.jsonl")
    curve = [
        {name: line[name] for name in line if name in KEPT or name.startswith("pool/")} for line in lines
    ]
    faults = find_faults(lines, kills, arguments.back_within)
    result = {"kills": kills, "faults": faults, "curve": curve}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    backs = ", ".join(f"{kill['back']} s" for kill in kills) or "-"
    print(
        f"{len(lines)} steps, {len(kills)} kills, back after {backs}; faults: {'; '.join(faults) or 'none'}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
