"""``rltrain compare``: every recipe under every seed, one run after the other, then one table and one figure.

Each run is a process of its own, the same one that ``rltrain train`` starts, in a folder that says what it
is. Started again, a comparison goes on where it stopped: finished runs are left alone and the one in hand
continues from its last checkpoint.
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

# What a method is made of: here recipes may differ.
_METHOD = ("about", "advantage", "control", "loss", "reward", "seed", "model.teacher", "data.order")
_METHOD_OF_ROLLOUT = (
    "rollout.extra_samples",
    "rollout.dynamic_sampling",
    "rollout.adaptive_temperature",
    "rollout.environment",
)
# What must be equal for numbers to mean the same: here they may not.
_SAME = ("model", "data", "eval", "train", "rollout.prompts", "rollout.n", "rollout.max_tokens")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    method: str
    seed: int
    command: tuple[str, ...]
    folder: Path


def conditions(recipes: Sequence[Path], profile: str | None, overrides: Sequence[str]) -> list[str]:
    """Keys outside the method in which recipes differ, a line each.

    Raises RecipeError where a difference makes numbers incomparable.
    """
    loaded = {path.stem: load_recipe(path, profile=profile, overrides=overrides) for path in recipes}
    flat = {name: dict(_flat(recipe.model_dump(mode="json"))) for name, recipe in loaded.items()}
    uncounted = _unlike_units(list(loaded.values()))
    if len(flat) < len(recipes):
        raise RecipeError(
            f"two recipes have one file name: {', '.join(path.name for path in recipes)}; rename one"
        )
    keys = sorted(set().union(*flat.values()))
    notes, problems = [], []
    for key in keys:
        values = {name: values.get(key) for name, values in flat.items()}
        if len(set(map(repr, values.values()))) == 1 or _below(key, (*_METHOD, *_METHOD_OF_ROLLOUT)):
            continue
        line = f"{key} differs: " + ", ".join(f"{name} {value!r}" for name, value in values.items())
        (problems if _below(key, _SAME) and key not in uncounted else notes).append(line)
    if problems:
        remedy = "a comparison needs them equal; choose a --profile or --set them"
        raise RecipeError([f"{line}; {remedy}" for line in problems])
    return notes


def _unlike_units(recipes: Sequence[AnyRecipe]) -> frozenset[str]:
    """Keys whose numbers count pairs in one recipe and single completions in another, so that equal
    ones would not be the same.
    """
    kinds = {
        takes_pairs(PREFERENCE_LOSSES.spec(one.loss.preference.name))
        for one in recipes
        if isinstance(one, OfflineRecipe)
    }
    return frozenset({"train.examples", "eval.examples"}) if len(kinds) > 1 else frozenset()


def _below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def plan_runs(
    recipes: Sequence[Path], seeds: int, out: Path, profile: str | None, overrides: Sequence[str]
) -> list[PlannedRun]:
    """Seed by seed, so that an early stop leaves all methods with equally many."""
    chosen = ["--profile", profile] if profile is not None else []
    keys = [part for override in overrides for part in ("--set", override)]
    return [
        PlannedRun(
            path.stem,
            seed,
            (
                sys.executable,
                "-m",
                "rltrain",
                "train",
                str(path),
                *chosen,
                *keys,
                "--seed",
                str(seed),
                "--run",
                str(folder),
            ),
            folder,
        )
        for seed in range(seeds)
        for path in recipes
        for folder in [out / path.stem / f"seed-{seed}"]
    ]


def run_all(plan: Sequence[PlannedRun], say: Callable[[str], None]) -> None:
    """Every run to its end.

    Raises UserError, naming the command, when one fails; the same comparison then goes on from there.
    """
    for number, one in enumerate(plan, start=1):
        say(f"[{number}/{len(plan)}] {one.method}, seed {one.seed}: {one.folder}")
        code = run_to_its_end(one.command)
        if code != 0:
            raise UserError(
                f"{one.method}, seed {one.seed} ended with exit code {code}; the command was: "
                f"{' '.join(one.command)}"
            )


def run_to_its_end(command: Sequence[str]) -> int:
    """The exit code of ``command``.

    A Ctrl-C reaches it too, and it may write its checkpoint; then this process is interrupted.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):
        return subprocess.run(command, check=False).returncode
    pressed: list[int] = []
    before = signal.signal(
        signal.SIGINT, lambda number, _: pressed.append(number)
    )  # a handler is not inherited, as SIG_IGN would be
    try:
        code = subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        interrupt()
    return code


def collect_runs(title: str, notes: Sequence[str], plan: Sequence[PlannedRun]) -> Comparison:
    """The comparison of the finished runs of ``plan``."""
    methods: dict[str, list[Curves]] = {}
    for one in plan:
        methods.setdefault(one.method, []).append(Curves.read(one.folder))
    return Comparison(title, tuple(notes), methods)
