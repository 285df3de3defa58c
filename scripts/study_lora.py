"""Trains a real small model with an adapter and in full, on equal samples, and writes the numbers of both to
scripts/results/lora.json.

    rltrain get-model smollm2 --out runs/lora/model
    python scripts/study_lora.py --out runs/lora

GRPO with the KL term of ``lora_grpo``, on questions such as "What is 27 + 14?". A run with an adapter takes
its reference from the model with the adapter switched off, a full one from a second model; the learning rate
of full training is a tenth. Both see the same prompts in the same order, and as many completions. The runs of
a seed follow one another, so that both see about the same load of the machine. Finished runs in ``--out`` are
reused: the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rltrain.analysis.curves import ANY, student_mean

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "scripts" / "results" / "lora.json"
VARIANTS = {
    "full": ("model.adapter=null", "learner.optimizer.lr=1e-5"),
    "lora": ("model.adapter={rank: 16, alpha: 32}", "learner.optimizer.lr=1e-4"),
    "lora_faster": ("model.adapter={rank: 16, alpha: 32}", "learner.optimizer.lr=3e-4"),
}
SIZES = {
    "data.max_prompt_tokens": 64,
    "rollout.prompts": 4,
    "rollout.n": 6,
    "rollout.max_tokens": 16,
    "eval.at_start": True,
    "eval.prompts": 48,
    "eval.n": 1,
    "eval.k": [1],
}
SYSTEM = "You add numbers. Answer at once."
ENDS = 2  # steps at either end of a run over which reward and entropy are averaged
PEAK = "peak.json"
PARTS = ("time/rollout", "time/annotate", "time/update", "time/step")


def make_questions(folder: Path) -> None:
    """2,000 questions to train on, and 64 others."""
    pairs = [(left, right) for left in range(10, 100) for right in range(10, 100)]
    random.Random(0).shuffle(pairs)
    for name, part in (("train", pairs[:2000]), ("test", pairs[2000:2064])):
        rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in part]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def train(variant: str, seed: int, run: Path, arguments: argparse.Namespace) -> None:
    """Trains one run in a process of its own and writes its peak resident memory, in bytes."""
    out = arguments.out
    keys = {
        **SIZES,
        "model.path": out / "model",
        "data.train": out / "train.jsonl",
        "data.eval": out / "test.jsonl",
        "data.options": {},
        "data.system": SYSTEM,
        "train.steps": arguments.steps,
        "report.transcripts": 0,
    }
    settings = [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()]
    command = [sys.executable, "-m", "rltrain", "train", str(ROOT / "recipes/policy/lora_grpo.yaml")]
    command += ["--profile", "tiny_cpu", "--seed", str(seed), "--run", str(run)]
    for setting in (*settings, *VARIANTS[variant]):
        command += ["--set", setting]
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{run} did not run to the end; the same command continues it")
    (run / PEAK).write_text(json.dumps({"bytes": usage.ru_maxrss * 1024}), encoding="utf-8")


def read_run(run: Path) -> dict[str, float]:
    """The numbers of one run. seconds: medians over steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "time/step" in line]
    evaluations = [line["eval/pass@1"] for line in lines if "eval/pass@1" in line]
    numbers = {
        "pass@1 before": evaluations[0],
        "pass@1 after": evaluations[-1],
        "GB": json.loads((run / PEAK).read_text(encoding="utf-8"))["bytes"] / 1e9,
        "completions": sum(line["rollout/tokens"] / line["rollout/length_mean"] for line in steps),
    }
    for name, key in (("reward", "reward/mean"), ("entropy", "learner/entropy_mean")):
        numbers[f"{name}, first steps"] = statistics.fmean(line[key] for line in steps[:ENDS])
        numbers[f"{name}, last steps"] = statistics.fmean(line[key] for line in steps[-ENDS:])
    for key in PARTS:
        numbers[f"s {key.partition('/')[2]}"] = statistics.median(line.get(key, 0.0) for line in steps)
    return numbers


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean over seeds, and its interval (Student's, 95 %) from two seeds on."""
    summary: dict[str, Any] = {}
    for name in runs[0]:
        within = (0.0, 1.0) if name.startswith(("pass@1", "reward")) else ANY
        spread = student_mean([run[name] for run in runs], within)
        bounds = () if len(runs) == 1 else (spread.low, spread.high)
        summary[name] = [round(value, 4) for value in (spread.value, *bounds)]
    return summary


def draw_table(variants: dict[str, Any]) -> str:
    """The rows of the page docs/lora.md: means and intervals, by variant."""
    names = [name for name in next(iter(variants.values())) if name not in ("settings", "seeds")]
    lines = [f"| | {' | '.join(variants)} |", f"|---|{'---|' * len(variants)}"]
    for name in names:
        cells = (", ".join(f"{value:.2f}" for value in variant[name]) for variant in variants.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "lora")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = arguments.out / "model"
    if not (model / "config.json").is_file():
        sys.exit(f"{model} is absent; make it with: rltrain get-model smollm2 --out {model}")
    make_questions(arguments.out)
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            run = arguments.out / variant / f"seed-{seed}"
            if not (run / PEAK).is_file():
                train(variant, seed, run, arguments)
            write_results(arguments)


def write_results(arguments: argparse.Namespace) -> None:
    """The numbers of all runs that have ended."""
    conditions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    conditions |= {"steps": arguments.steps} | SIZES
    variants: dict[str, Any] = {}
    for name, settings in VARIANTS.items():
        runs = [read_run(path.parent) for path in sorted((arguments.out / name).glob(f"seed-*/{PEAK}"))]
        if runs:
            variants[name] = {"settings": settings, "seeds": len(runs), **summarize(runs)}
    record = {"conditions": conditions, "variants": variants}
    KEPT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(draw_table(variants), flush=True)


if __name__ == "__main__":
    main()
