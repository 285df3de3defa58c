"""How long ten mistakes of a user take to be told, each in a process of its own.

    python scripts/measure_mistakes.py [--repeat 3] [--out scripts/results/mistakes.json]

For each, the fewest wall-clock and CPU seconds of the repetitions, and the line that was printed. Exit code 1
where one takes a second of CPU time or more, imports torch or is not one line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 1.0  # seconds
_GRPO = ("grpo", "--profile", "tiny_cpu")
_MODEL = ("--set", "model.path={folder}/model")  # a folder with a config.json, all that is looked at here
MISTAKES: dict[str, tuple[str, ...]] = {
    "a recipe's name": ("train", "grpoo"),
    "a key": ("train", *_GRPO, "--set", "rollout.promts=3"),
    "a value": ("train", *_GRPO, "--set", "learner.optimizer.betas=[1.5, 0.9]"),
    "a method": ("train", *_GRPO, "--set", "loss.policy.name=clipp"),
    "the model's folder": ("train", *_GRPO, "--set", "model.path=./none"),
    "the data file": ("train", *_GRPO, *_MODEL, "--set", "data.train=none.jsonl"),
    "a row": ("train", *_GRPO, *_MODEL, "--set", "data.train={folder}/rows.jsonl"),
    "an attention kernel": ("train", *_GRPO, *_MODEL, "--set", "model.attention=sdpa"),
    "a run folder with other files": ("train", *_GRPO, *_MODEL, "--run", "{folder}"),
    "a report of no run": ("report", "none"),
}


def measure(arguments: tuple[str, ...], folder: Path, repeat: int) -> dict[str, Any]:
    """The fewest seconds of ``repeat`` processes, and what was printed."""
    words = [word.format(folder=folder) for word in arguments]
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'poison'}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    walls: list[float] = []
    cpus: list[float] = []
    for _ in range(repeat):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-m", "rltrain", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    line = ended.stderr.strip().replace(str(folder), "FOLDER")
    is_fine = ended.returncode == 2 and "\n" not in line and min(cpus) < LIMIT
    return {
        "command": command_text(arguments),
        "wall_seconds": round(min(walls), 2),
        "cpu_seconds": round(min(cpus), 2),
        "line": line,
        "fine": is_fine,
    }


def command_text(arguments: tuple[str, ...]) -> str:
    return " ".join(["rltrain", *arguments]).replace("{folder}", "FOLDER")


def make_inputs(folder: Path) -> None:
    """A model's config, a file with a malformed row, and a torch that ends the process which imports it."""
    (folder / "model").mkdir()
    (folder / "poison").mkdir()
    (folder / "model/config.json").write_text('{"model_type": "gpt_oss", "max_position_embeddings": 512}')
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n')
    (folder / "poison/torch.py").write_text("raise SystemExit('torch was imported')")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "scripts/results/mistakes.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        results = {
            mistake: measure(arguments, Path(name), options.repeat) for mistake, arguments in MISTAKES.items()
        }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    options.out.write_text(json.dumps({"machine": machine, "mistakes": results}, indent=2) + "\n")
    for mistake, result in results.items():
        mark = "ok  " if result["fine"] else "FAIL"
        print(f"{mark}  {result['wall_seconds']:5.2f} s  {mistake}: {result['line']:.90}")
    if not all(result["fine"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
