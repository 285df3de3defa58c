"""``rltrain compare``: trains every recipe with every seed, one run after the other, then makes one table and
one figure.

Each run is a separate ``rltrain train`` process in a folder named by method and seed. A comparison that is
started again continues where it stopped: it skips finished runs and continues the interrupted run from its
last checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.analysis.comparison import Comparison
from rltrain.analysis.curves import Curves
from rltrain.config.load import load_recipe
from rltrain.config.rules.offline import takes_pairs
from rltrain.config.schema import AnyRecipe, OfflineRecipe
from rltrain.errors import RecipeError, UserError
from rltrain.interrupt import interrupt
from rltrain.loss.preference import PREFERENCE_LOSSES

# The keys of a method, in which recipes may differ.
_METHOD = ("about", "advantage", "control", "loss", "reward", "seed", "model.teacher", "data.order")
_METHOD_OF_ROLLOUT = (
    "rollout.extra_samples",
    "rollout.dynamic_sampling",
    "rollout.adaptive_temperature",
    "rollout.environment",
)
# The keys in which recipes must agree, so that their numbers are comparable.
_MUST_BE_EQUAL = ("model", "data", "eval", "train", "rollout.prompts", "rollout.n", "rollout.max_tokens")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    method: str
    seed: int
    command: tuple[str, ...]
    folder: Path


def compare_conditions(recipes: Sequence[Path], profile: str | None, overrides: Sequence[str]) -> list[str]:
    """Keys outside the method in which recipes differ, one line each.

    Raises RecipeError if a difference makes the numbers incomparable.
    """
    loaded = {path.stem: load_recipe(path, profile=profile, overrides=overrides) for path in recipes}
    flat = {name: dict(_flatten(recipe.model_dump(mode="json"))) for name, recipe in loaded.items()}
    exempt_keys = _keys_of_different_units(list(loaded.values()))
    if len(flat) < len(recipes):
        raise RecipeError(
            f"two recipes have one file name: {', '.join(path.name for path in recipes)}; rename one"
        )

    keys = sorted(set().union(*flat.values()))
    notes: list[str] = []
    problems: list[str] = []
    for key in keys:
        values = {name: values.get(key) for name, values in flat.items()}
        if len(set(map(repr, values.values()))) == 1 or _is_in_sections(key, (*_METHOD, *_METHOD_OF_ROLLOUT)):
            continue
        line = f"{key} differs: " + ", ".join(f"{name} {value!r}" for name, value in values.items())
        is_problem = _is_in_sections(key, _MUST_BE_EQUAL) and key not in exempt_keys
        (problems if is_problem else notes).append(line)
    if problems:
        remedy = "a comparison needs them equal; choose a --profile or --set them"
        raise RecipeError([f"{line}; {remedy}" for line in problems])
    return notes


def _keys_of_different_units(recipes: Sequence[AnyRecipe]) -> frozenset[str]:
    """Keys that count pairs in one recipe and single completions in another, so that equal numbers would
    not be equal amounts.
    """
    pair_units = {
        takes_pairs(PREFERENCE_LOSSES.spec(recipe.loss.preference.name))
        for recipe in recipes
        if isinstance(recipe, OfflineRecipe)
    }
    return frozenset({"train.examples", "eval.examples"}) if len(pair_units) > 1 else frozenset()


def _is_in_sections(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def plan_runs(
    recipes: Sequence[Path], seeds: int, out: Path, profile: str | None, overrides: Sequence[str]
) -> list[PlannedRun]:
    """All runs, ordered by seed, so that an early stop leaves every method with the same number of runs."""
    profile_options = ["--profile", profile] if profile is not None else []
    set_options = [part for override in overrides for part in ("--set", override)]
    plan = []
    for seed in range(seeds):
        for path in recipes:
            folder = out / path.stem / f"seed-{seed}"
            run_options = ["--seed", str(seed), "--run", str(folder)]
            arguments = ["train", str(path), *profile_options, *set_options, *run_options]
            command = (sys.executable, "-m", "rltrain", *arguments)
            plan.append(PlannedRun(path.stem, seed, command, folder))
    return plan


def run_all(plan: Sequence[PlannedRun], say: Callable[[str], None]) -> None:
    """Trains every run to its end.

    Raises UserError with the command when a run fails; the same comparison can then be started again.
    """
    for number, run in enumerate(plan, start=1):
        say(f"[{number}/{len(plan)}] {run.method}, seed {run.seed}: {run.folder}")
        code = run_command(run.command)
        if code != 0:
            raise UserError(
                f"{run.method}, seed {run.seed} ended with exit code {code}; the command was: "
                f"{' '.join(run.command)}"
            )


def run_command(command: Sequence[str]) -> int:
    """Runs ``command`` and returns its exit code.

    A Ctrl-C also reaches the command, which may write its checkpoint; afterwards this process is interrupted.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):
        return subprocess.run(command, check=False).returncode
    interrupts: list[int] = []
    # the command does not inherit a handler, as it would inherit SIG_IGN
    previous_handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        code = subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if interrupts:
        interrupt()
    return code


def collect_runs(title: str, notes: Sequence[str], plan: Sequence[PlannedRun]) -> Comparison:
    """The comparison of the finished runs of ``plan``."""
    methods: dict[str, list[Curves]] = {}
    for run in plan:
        methods.setdefault(run.method, []).append(Curves.read(run.folder))
    return Comparison(title, tuple(notes), methods)
