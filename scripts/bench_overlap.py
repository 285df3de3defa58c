"""The seconds of a step with real workers, in turn with the learner and at the same time, and what
``rltrain plan --measured`` predicts of the second from the first. Writes scripts/results/overlap.json.

    rltrain tiny-model --steps 1 --out .cache/untrained
    python scripts/bench_overlap.py --model .cache/untrained --out runs/overlap

The model is hardly trained, so that its completions are long.

GRPO under ``--profile tiny_cpu`` with the engine ``vllm_server`` and two workers of this machine: ``sync``,
and ``lag``, which is ``rollout.schedule: {lag: 1}`` with truncated importance weights (``tis``). On a machine
whose cores the workers use up already, overlap gains what they leave idle. Finished runs in ``--out`` are
reused.

step_s: from the start of one step to that of the next, the median; step_mean_s: the mean. sampling_s,
learning_s, push_s: see ``rltrain plan --measured``. load: of the machine, just before the run and after it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.cli.measured_plan import measure_run
from rltrain.timeline import read_timeline

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "scripts" / "results" / "overlap.json"
VARIANTS = {"sync": (), "lag": ("rollout.schedule={lag: 1}", "control=[tis]")}
SETTINGS = (
    *("rollout.engine=vllm_server", "rollout.workers={count: 2}", "data.eval=null", "checkpoint.every=0"),
    *("rollout.prompts=16", "rollout.n=8", "rollout.max_tokens=64", "report.transcripts=0"),
)
LOAD = "load.json"  # in a run folder, when the run has ended


def train(variant: str, run: Path, arguments: argparse.Namespace) -> None:
    """Trains one run in processes of its own."""
    command = [sys.executable, "-m", "rltrain", "train", str(ROOT / "recipes/policy/grpo.yaml")]
    command += ["--profile", "tiny_cpu", "--run", str(run)]
    sizes = (f"model.path={arguments.model}", f"train.steps={arguments.steps}")
    for setting in (*SETTINGS, *sizes, *VARIANTS[variant]):
        command += ["--set", setting]
    before = os.getloadavg()[0]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        sys.exit(f"{run} did not run to the end; remove it and start again")
    (run / LOAD).write_text(json.dumps([round(before, 2), round(os.getloadavg()[0], 2)]), encoding="utf-8")


def read_run(run: Path) -> dict[str, Any]:
    folder = RunFolder.from_path(run)
    measured, _ = measure_run(folder)
    starts = {
        each.facts["step"]: each.start
        for each in read_timeline(folder.timeline)
        if (each.lane, each.kind) == ("learner", "wait")
    }
    seconds = [starts[step + 1] - starts[step] for step in measured.steps if step + 1 in starts]
    return {
        "step_s": round(statistics.median(seconds), 4),
        "step_mean_s": round(statistics.fmean(seconds), 4),
        "sampling_s": round(measured.sampling, 4),
        "learning_s": round(measured.learning, 4),
        "push_s": round(measured.push, 4),
        "tokens": round(measured.tokens),
        "workers": measured.workers,
        "steps": [measured.steps[0], measured.steps[-1]],
        "load": json.loads((run / LOAD).read_text(encoding="utf-8")),
    }


def write_results(out: Path) -> None:
    runs = {name: read_run(out / name) for name in VARIANTS}
    measured, _ = measure_run(RunFolder.from_path(out / "sync"))
    predicted = measured.predict(measured.learners, measured.workers, overlaps=True)
    record = {
        "conditions": {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "torch": importlib.metadata.version("torch"),
            "settings": SETTINGS,
        },
        **runs,
        "sync to lag": round(runs["sync"]["step_s"] / runs["lag"]["step_s"], 3),
        "sync to lag, means": round(runs["sync"]["step_mean_s"] / runs["lag"]["step_mean_s"], 3),
        "lag predicted from sync, if neither slowed the other": round(predicted.seconds, 4),
    }
    KEPT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=".cache/untrained")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "overlap")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    for variant in VARIANTS:
        if not (arguments.out / variant / LOAD).is_file():
            train(variant, arguments.out / variant, arguments)
    write_results(arguments.out)


if __name__ == "__main__":
    main()
