"""Measures every recipe at laptop scale: trains each once under a profile and writes the held-out numbers to
recipes/measured.json.

    rltrain tiny-model --out .cache/tiny-model
    python scripts/measure_recipes.py [RECIPE...] [--steps 40] [--seed 0] [--out runs/measured]

One seed and few steps (``--steps`` for recipes that sample, the profile's for data sets) are enough to see
that a method learns and how it changes entropy, but not to rank methods. Finished runs in ``--out`` are
reused, so that the script continues where it stopped. ``scripts/methods_table.py`` writes the numbers to
docs/methods.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rltrain.config.load import load_recipe
from rltrain.config.schema import OfflineRecipe

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "recipes" / "measured.json"
FOLDERS = ("policy", "preference", "process_reward", "supervised")
# measured in docs/studies (learned_reward.md, gsm8k_calculator.md), in an environment of several turns, for
# which the tiny model must first be trained on the environment's commands, or beyond that model: it writes no
# SQL, and EMPO's clusters need a server
EXCLUDED = {
    f"policy/{name}"
    for name in (
        *("gsm8k_calculator", "empg_calculator", "epo_calculator", "empg_textworld", "epo_textworld"),
        *("grpo_reward_model", "grpo_sql", "empo_model"),
    )
}
MEASURES = ("eval/pass@1", "eval/accuracy", "eval/avg@8", "eval/loss")
ENTROPY = "learner/entropy_mean"


def recipes() -> list[str]:
    names = [
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for name in FOLDERS
        for path in (ROOT / "recipes" / name).glob("*.yaml")
    ]
    return sorted(set(names) - EXCLUDED)


def model_digest(profile: str) -> str:
    """Of the weights that the profile's runs start from: results of different models cannot be compared."""
    path = load_recipe(ROOT / "recipes/policy/grpo.yaml", profile=profile, overrides=[]).model.path
    return hashlib.sha256((ROOT / path / "model.safetensors").read_bytes()).hexdigest()[:16]


def command(recipe: str, arguments: argparse.Namespace) -> list[str]:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    keys: dict[str, Any] = {"eval.at_start": "true", "eval.every": 0}
    if not isinstance(load_recipe(path, profile=arguments.profile, overrides=[]), OfflineRecipe):
        keys["train.steps"] = arguments.steps
    settings = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    options = [
        "--profile",
        arguments.profile,
        "--seed",
        str(arguments.seed),
        "--run",
        str(arguments.out / recipe),
    ]
    return [sys.executable, "-m", "rltrain", "train", str(path), *options, *settings]


def summary(folder: Path) -> dict[str, Any]:
    """Held-out numbers before and after with 95 % bootstrap bounds, and mean entropy in the first and the
    last tenth of the steps.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measure = next(name for name in MEASURES if any(name in line for line in lines))
    evaluations = [line for line in lines if measure in line]
    before = evaluations[0]
    after = evaluations[-1]
    steps = [line for line in lines if "time/step" in line]
    record: dict[str, Any] = {"measure": measure.partition("/")[2], "steps": len(steps)}
    for name, line in (("before", before), ("after", after)):
        record[name] = [round(line[f"{measure}{end}"], 4) for end in ("", "_low", "_high")]
    entropies = [line[ENTROPY] for line in steps if ENTROPY in line]
    if entropies:
        tenth = max(1, len(entropies) // 10)
        record["entropy"] = [
            round(statistics.fmean(part), 4) for part in (entropies[:tenth], entropies[-tenth:])
        ]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="such as policy/grpo; none: all")
    parser.add_argument("--profile", default="tiny_cpu")
    parser.add_argument(
        "--steps",
        type=int,
        default=40,
        help="of recipes that sample; other recipes have the profile's number of steps",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "measured")
    arguments = parser.parse_args()
    conditions = {name: getattr(arguments, name) for name in ("profile", "steps", "seed")}
    conditions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    conditions["model"] = model_digest(arguments.profile)
    record = (
        json.loads(KEPT.read_text(encoding="utf-8"))
        if KEPT.is_file()
        else {"conditions": conditions, "recipes": {}}
    )
    if record["conditions"] != conditions:
        sys.exit(
            f"{KEPT} was measured under {record['conditions']}, the conditions are now {conditions}; "
            "delete it to measure all recipes again"
        )
    failures = []
    for recipe in arguments.recipes or recipes():
        if (
            not (arguments.out / recipe / "model").is_dir()
            and subprocess.run(command(recipe, arguments), cwd=ROOT, check=False).returncode != 0
        ):
            failures.append(recipe)
            continue
        record["recipes"][recipe] = summary(arguments.out / recipe)
        record["recipes"] = dict(sorted(record["recipes"].items()))
        KEPT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(recipe, record["recipes"][recipe], flush=True)
    if failures:
        sys.exit(f"did not run to the end: {', '.join(failures)}")


if __name__ == "__main__":
    main()
