"""Trains the tiny model with samples of the present policy and with those of the one before, on equal numbers
of samples, and writes reward and entropy of both to scripts/results/lag.json.

    rltrain tiny-model
    python scripts/study_lag.py --out runs/lag

GRPO under ``--profile tiny_cpu``: ``sync``, and ``lag``, which is ``rollout.schedule: {lag: 1}`` with
truncated importance weights (``tis``). The runs of a seed see the same prompts in the same order, and are
compared in pairs: the difference of a number is the mean over seeds with Student's interval (95 %). Finished
runs in ``--out`` are reused: the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rltrain.analysis.curves import student_mean

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "scripts" / "results" / "lag.json"
VARIANTS = {"sync": (), "lag": ("rollout.schedule={lag: 1}", "control=[tis]")}
ENDS = 10  # steps at either end of a run over which reward and entropy are averaged
NUMBERS = {"reward": "reward/mean", "entropy": "learner/entropy_mean"}
DONE = "model/model.safetensors"


def train(variant: str, seed: int, run: Path, arguments: argparse.Namespace) -> None:
    """Trains one run in a process of its own."""
    command = [sys.executable, "-m", "rltrain", "train", str(ROOT / "recipes/policy/grpo.yaml")]
    command += ["--profile", "tiny_cpu", "--seed", str(seed), "--run", str(run)]
    settings = (f"model.path={arguments.model}", f"train.steps={arguments.steps}", "report.transcripts=0")
    for setting in (*settings, *VARIANTS[variant]):
        command += ["--set", setting]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        sys.exit(f"{run} did not run to the end; the same command continues it")


def read_run(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    numbers = {"pass@1 after": [line["eval/pass@1"] for line in lines if "eval/pass@1" in line][-1]}
    for name, key in NUMBERS.items():
        numbers[f"{name}, first steps"] = statistics.fmean(line[key] for line in steps[:ENDS])
        numbers[f"{name}, last steps"] = statistics.fmean(line[key] for line in steps[-ENDS:])
    return numbers


def summarize(values: list[float]) -> list[float]:
    """Mean and interval."""
    spread = student_mean(values)
    return [round(value, 5) for value in (spread.value, spread.low, spread.high)]


def write_results(arguments: argparse.Namespace) -> None:
    """The numbers of the seeds of which both runs have ended."""
    seeds = [
        seed
        for seed in range(arguments.seeds)
        if all((arguments.out / name / f"seed-{seed}" / DONE).is_file() for name in VARIANTS)
    ]
    if len(seeds) < 2:
        return
    runs = {name: [read_run(arguments.out / name / f"seed-{seed}") for seed in seeds] for name in VARIANTS}
    names = list(runs["sync"][0])
    pairs = list(zip(runs["lag"], runs["sync"], strict=True))
    differences = {name: summarize([lag[name] - sync[name] for lag, sync in pairs]) for name in names}
    record: dict[str, Any] = {
        "conditions": {
            "torch": importlib.metadata.version("torch"),
            "steps": arguments.steps,
            "seeds": seeds,
        },
        "variants": {
            variant: {
                "settings": settings,
                **{name: summarize([run[name] for run in runs[variant]]) for name in names},
            }
            for variant, settings in VARIANTS.items()
        },
        "lag minus sync": differences,
    }
    KEPT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, (value, low, high) in differences.items():
        print(f"{name}: lag minus sync {value:+.4f} [{low:+.4f}, {high:+.4f}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=".cache/tiny-model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "lag")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            run = arguments.out / variant / f"seed-{seed}"
            if not (run / DONE).is_file():
                train(variant, seed, run, arguments)
        write_results(arguments)


if __name__ == "__main__":
    main()
