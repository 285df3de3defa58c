"""Golden runs: loss, gradient norm, entropy and rewards of a few steps of tiny recipes of every kind, stored
in tests/golden.

    python scripts/golden.py check [NAME ...]        # compare the current numbers with the stored ones
    python scripts/golden.py make [NAME ...]         # store the current numbers as the right ones
    # OLD, NEW: a commit, a folder of golden files, or the folder of a run
    python scripts/golden.py compare OLD NEW [NAME ...]

A change of numerics is a decision: its author runs ``make``, checks the difference in the JSON and explains
it in the commit. In the environment in which a file was made (same machine, same versions, one thread)
numbers are equal to the last bit; in other environments they agree within ``RTOL``, because sums of float32
numbers depend on the processor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
NAMES = {  # recipes by folder
    "policy": (
        *("cispo", "dapo", "dr_grpo", "gmpo", "grpo", "gspo", "gsm8k_calculator", "reinforce_pp", "rloo"),
        *("aepo", "clip_cov", "hapo", "kl_cov", "steer"),  # entropy control
        "adaptive_entropy",  # a term and its controller
    ),
    "preference": ("dpo", "kto", "online_dpo"),
    "process_reward": ("implicit_prm_ce",),
}
# A run has some of these: with sampled completions the first four, with given preferences the first two and
# some of the last three.
METRICS = (
    "loss/total",
    "learner/grad_norm",
    "learner/entropy_mean",
    "reward/mean",
    "loss/margin",
    "loss/reward",
    "loss/z0",
)
# tolerances in another environment; ATOL for numbers that are 0 up to rounding
RTOL = 1e-3
ATOL = 1e-6
# A few short steps of an untrained model, with several micro-batches each. AdamW's eps is above the rounding
# noise of a gradient; with a smaller eps, AdamW would turn that noise, which differs between processors, into
# full steps of the learning rate.
SETTINGS = (
    "train.steps=3",
    "rollout.prompts=16",
    "rollout.n=4",
    "learner.optimizer.lr=2e-4",
    "learner.optimizer.eps=1e-5",
    "learner.tokens_per_micro_batch=256",
    "data.eval=null",
    "reward.workers=1",
)
OFFLINE_SETTINGS = (  # the same for recipes that do not sample
    "train.steps=3",
    "train.examples=16",
    *(setting for setting in SETTINGS if setting.startswith("learner.")),
    "learner.optimizer.schedule=constant",
    "learner.optimizer.min_lr_ratio=0",
    "data.eval=null",
    "data.max_examples=48",  # what the steps train on: all get the reference's log-probs before the first
    "reference.cache=null",
)
# The model's entropy is near 4 nats, so the coefficient rises from the second step on.
EXTRA_SETTINGS = {
    "adaptive_entropy": (
        "loss.terms=[{name: entropy, coefficient: {name: target_entropy, target: 4.5, step: 0.02}}]",
    )
}

Series = dict[str, list[float]]


def kept_names() -> list[str]:
    """Names of the recipes that have stored numbers."""
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def every_name() -> list[str]:
    """Names of the recipes that must have stored numbers."""
    return sorted(name for names in NAMES.values() for name in names)


def recipe_of(name: str) -> str:
    """The recipe's folder and name, as in "policy/grpo"; a recipe outside NAMES is found in its folder."""
    listed_paths = [f"{folder}/{name}" for folder, names in NAMES.items() if name in names]
    paths = listed_paths or [
        f"{folder}/{name}" for folder in NAMES if (ROOT / "recipes" / folder / f"{name}.yaml").is_file()
    ]
    if not paths:
        raise SystemExit(f"golden: no recipe is called {name!r} in recipes/{', recipes/'.join(NAMES)}")
    return paths[0]


def settings_of(name: str) -> list[str]:
    """The settings of a golden run except model and reward."""
    return [*(SETTINGS if samples(name) else OFFLINE_SETTINGS), *EXTRA_SETTINGS.get(name, ())]


def samples(name: str) -> bool:
    """Whether the recipe learns from samples of its policy, and so has rewards."""
    from rltrain.config.load import load_recipe

    recipe = load_recipe(ROOT / "recipes" / f"{recipe_of(name)}.yaml", profile="tiny_cpu", overrides=[])
    return getattr(recipe, "kind", None) != "offline"


def environment() -> dict[str, Any]:
    """Everything that must be equal for numbers to be equal to the last bit."""
    import numpy
    import torch
    import transformers

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
    return {
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": 1,
    }


def run(name: str, model: Path, out: Path) -> Series:
    """Train the recipe ``name`` for a few steps in ``out``, which must not exist; returns its numbers per
    step.
    """
    import torch

    from rltrain.cli.train import train_command
    from rltrain.config.load import load_recipe
    from rltrain.config.rules import check

    reward = [f"reward.functions=['{GOLDEN / 'sevens.py'}:sevens']"] if samples(name) else []
    settings = [f"model.path={model}", *reward, *settings_of(name)]
    recipe = check(
        load_recipe(ROOT / "recipes" / f"{recipe_of(name)}.yaml", profile="tiny_cpu", overrides=settings)
    ).recipe
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        code = train_command(recipe, out, [])
    finally:
        torch.set_num_threads(threads)
    if code != 0:
        raise RuntimeError(f"{name}: the run ended with exit code {code}")
    return series(out)


def series(run_folder: Path) -> Series:
    """The metrics of a run folder that golden files store."""
    lines = [
        json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [line for line in lines if "learner/lr" in line]
    return {
        metric: [line[metric] for line in steps]
        for metric in METRICS
        if all(metric in line for line in steps)
    }


def tiny_model(folder: Path) -> Path:
    """The seeded, untrained model from which every golden run starts."""
    from rltrain.build.tiny_model import make_random_model

    return make_random_model(folder / "model", tied=False, seed=0)


def write(path: Path, name: str, series: Series) -> None:
    record = {
        "recipe": recipe_of(name),
        "settings": settings_of(name),
        "environment": environment(),
        "steps": series,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def differences(
    old: Mapping[str, Sequence[float]], new: Mapping[str, Sequence[float]], *, exact: bool
) -> list[str]:
    """One line for each metric that differs, for the first step where it differs."""
    lines = []
    for metric in sorted(old.keys() | new.keys()):
        before = list(old.get(metric, ()))
        after = list(new.get(metric, ()))
        if len(before) != len(after):
            lines.append(f"{metric}: {len(before)} steps before, {len(after)} now")
            continue
        for step, (old_value, new_value) in enumerate(zip(before, after, strict=True), start=1):
            if not (
                old_value == new_value
                if exact
                else math.isclose(old_value, new_value, rel_tol=RTOL, abs_tol=ATOL)
            ):
                lines.append(
                    f"{metric}, step {step}: {old_value!r} before, {new_value!r} now (relative "
                    f"{abs(new_value - old_value) / max(abs(old_value), 1e-30):.1e})"
                )
                break
    return lines


def verdict(name: str, kept: Mapping[str, Any], series: Series) -> str | None:
    """None if ``series`` agrees with the stored numbers, else the differences and the remedy."""
    exact = kept["environment"] == environment()
    lines = differences(kept["steps"], series, exact=exact)
    if not lines:
        return None
    tolerance = (
        "made in this environment, so held to the last bit"
        if exact
        else f"made elsewhere, so held to {RTOL:g}"
    )
    remedy = (
        f"If that is intended: python scripts/golden.py make {name}, and say in the commit why the numbers "
        "change."
    )
    return "\n".join(
        [f"the numbers of recipes/{kept.get('recipe', name)}.yaml changed ({tolerance}):", *lines, remedy]
    )


# commands ---------------------------------------------------------------------------------------------------


def runs(names: Sequence[str]) -> Iterator[tuple[str, Series]]:
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        model = tiny_model(Path(temporary))
        for name in names:
            yield name, run(name, model, Path(temporary) / name)


def make(names: Sequence[str], out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for name, series in runs(names or every_name()):
        write(out / f"{name}.json", name, series)
        print(f"{out / name}.json")
    return 0


def check(names: Sequence[str]) -> int:
    kept = {path.stem: read(path) for path in sorted(GOLDEN.glob("*.json"))}
    reports = [
        text
        for name, series in runs(names or list(kept))
        if (text := verdict(name, kept[name], series)) is not None
    ]
    print("\n\n".join(reports) or "all golden runs agree")
    return 1 if reports else 0


def compare(old: str, new: str, names: Sequence[str]) -> int:
    before = numbers_of(old, names)
    after = numbers_of(new, names)
    count = 0
    for name in sorted(before.keys() & after.keys()):
        lines = differences(before[name], after[name], exact=True)
        count += bool(lines)
        print(
            "\n".join(
                [
                    f"{name}: {'differs' if lines else 'equal to the last bit'}",
                    *(f"  {line}" for line in lines),
                ]
            )
        )
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name}: only in {old if name in before else new}")
    return 1 if count else 0


def numbers_of(where: str, names: Sequence[str]) -> dict[str, Series]:
    """The numbers of a run folder, of a folder of golden files, or of a commit, whose code is run here.

    names: the recipes to run for a commit; empty: those with stored numbers. Recipes that the commit lacks
    are left out.
    """
    path = Path(where)
    if (path / "metrics.jsonl").is_file():
        return {"run": series(path)}
    if path.is_dir():
        return {file.stem: read(file)["steps"] for file in sorted(path.glob("*.json"))}
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", where], capture_output=True)
        if archive.returncode != 0:
            raise SystemExit(
                f"golden: {where!r} is neither a folder nor a commit: {archive.stderr.decode().strip()}"
            )
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        for source in (Path(__file__), GOLDEN / "sevens.py"):  # both commits run the same script and reward
            copy = tree / source.resolve().relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
        out = Path(temporary) / "numbers"
        requested = names or kept_names()
        available = [
            name
            for name in requested
            if any((tree / "recipes" / folder / f"{name}.yaml").is_file() for folder in NAMES)
        ]
        if not available:
            return {}
        command = [sys.executable, str(tree / "scripts" / "golden.py"), "make", *available, "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        if subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
            raise SystemExit(f"golden: a run of {where} failed, see above; name the recipes to compare")
        return {file.stem: read(file)["steps"] for file in sorted(out.glob("*.json"))}


def _processor() -> str:
    """The name of the processor model, which decides which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("check", "make"):
        command_parser = commands.add_parser(command)
        command_parser.add_argument("names", nargs="*", metavar="NAME")
        if command == "make":
            command_parser.add_argument("--out", type=Path, default=GOLDEN)
    compare_parser = commands.add_parser("compare")
    compare_parser.add_argument("old")
    compare_parser.add_argument("new")
    compare_parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    match options.command:
        case "check":
            return check(options.names)
        case "make":
            return make(options.names, options.out)
    return compare(options.old, options.new, options.names)


if __name__ == "__main__":
    sys.exit(main())
