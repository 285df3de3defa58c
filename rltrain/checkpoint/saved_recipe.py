"""The recipe that a run folder was written by, compared with the one at hand. Imports no torch, so that a
mistake is told at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rltrain.checkpoint.manifest import MANIFEST, DamagedCheckpointError
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.config.load import load_recipe
from rltrain.config.schema import AnyRecipe
from rltrain.errors import RecipeError, UserError

AUTO = "auto"
NEVER = "never"
_LENGTHS = ("train.steps", "train.epochs")
# Deadlines, numbers of processes, written files and messages. No prompt is drawn, sampled, graded or learned
# from in another way, so the run goes on in the same numbers. reward.seconds and reward.memory_gib are not
# free (a completion over a limit stays ungraded), nor are settings that stop a run by its numbers
# (rollout.mismatch_stop) or that change logged numbers (sync, eval).
_FREE = (
    "about",
    "train.deadline_seconds",
    "train.max_hours",
    "reward.workers",
    "rollout.environment.workers",
    "rollout.mismatch_warn",
    "rollout.workers",
    "rollout.reference_workers",
    "rollout.server.url",
    "rollout.server.authority",
    "rollout.server.silence_seconds",
    "rollout.server.call_seconds",
    "rollout.server.liveness_seconds",
    "checkpoint",
    "journal",
    "report",
    "push",
)


def require_startable(folder: RunFolder, recipe: AnyRecipe, resume: str) -> None:
    """Raises UserError for what ``open_run`` refuses, as far as no state has to be read: a folder that holds
    something else or another recipe's run, and a checkpoint that is not there.
    """
    if resume not in (AUTO, NEVER):
        require_manifest(Path(resume).expanduser().absolute())
    if resume == NEVER or not folder.recipe.is_file():
        folder.is_empty_folder()
        return
    saved = read_saved_recipe(folder)
    date = recipe.data.date or saved.data.date  # a run's own goes on, where the recipe names none
    dated = recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": date})})
    saved_fields, fields = (each.model_dump(mode="json") for each in (saved, dated))
    refuse_other_recipe(saved_fields, fields, str(folder.recipe), lambda text: None)


def require_manifest(checkpoint: Path) -> None:
    """Raises DamagedCheckpointError where ``checkpoint`` is no complete one, or nothing at all."""
    if not (checkpoint / MANIFEST).is_file():
        raise DamagedCheckpointError(
            f"{checkpoint}: {MANIFEST} is missing, so this is no complete checkpoint; resume from another "
            "checkpoint"
        )


def read_saved_recipe(folder: RunFolder) -> AnyRecipe:
    try:
        return load_recipe(folder.recipe)
    except RecipeError as error:
        refusal = (
            f"run folder {folder.path} already holds a run, whose recipe cannot be read; choose another --run"
        )
        raise UserError("\n".join([refusal, *error.problems])) from error


def is_free(key: str) -> bool:
    """Whether a run may continue with another value of this key."""
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def refuse_other_recipe(
    saved: Mapping[str, Any], current: Mapping[str, Any], where: str, warn: Callable[[str], None]
) -> None:
    """Raises UserError with every key that differs, unless the run is only made longer under a constant
    learning rate schedule.

    A warning names the free keys that differ.
    """
    changed = list(differences(saved, current))
    refused = [change for change in changed if not is_free(change[0])]
    free_changes = [change for change in changed if is_free(change[0])]
    is_length_alone = (
        len(refused) == 1
        and refused[0][0] in _LENGTHS
        and all(isinstance(length, int | float) for length in refused[0][1:])
    )
    is_longer = is_length_alone and refused[0][2] > refused[0][1]
    schedule = current["learner"]["optimizer"]["schedule"]
    lags = current.get("rollout", {}).get("schedule", "sync") != "sync"
    if not refused or (is_longer and schedule == "constant" and not lags):
        if free_changes:
            free = ", ".join(_change_lines(free_changes))
            warn(f"the run goes on with other settings, on which none of its numbers depends: {free}")
        return

    lines = _change_lines(refused)
    if is_longer and lags and schedule == "constant":
        lines.append(
            "with this rollout.schedule, the first of the new steps would train on samples of weights that "
            "are gone"
        )
    elif is_longer:
        lines.append(
            f"the steps taken had a {schedule} schedule that ends at {refused[0][1]}; only a constant one "
            "can go on longer"
        )
    elif is_length_alone:
        lines.append("a run can be made longer, not shorter")
    remedy = "continue it with its own recipe, or choose another --run"
    raise UserError("\n".join([f"{where} was written by another recipe; {remedy} (saved -> now):", *lines]))


def _change_lines(changes: Sequence[tuple[str, Any, Any]]) -> list[str]:
    return [f"{key}: {describe_value(before)} -> {describe_value(now)}" for key, before, now in changes]


_ABSENT = object()


def differences(saved: Any, current: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, current value) wherever two recipes as plain data differ; lists of unequal
    length differ as a whole.
    """
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for name in {**saved, **current}:
            if name == "sha256":  # of a user's code, which is compared with the run's other inputs
                continue
            dotted = f"{key}.{name}" if key else name
            yield from differences(saved.get(name, _ABSENT), current.get(name, _ABSENT), dotted)
    elif isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        for index, (before, now) in enumerate(zip(saved, current, strict=True)):
            yield from differences(before, now, f"{key}.{index}")
    elif saved != current:
        yield key, saved, current


def describe_value(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
