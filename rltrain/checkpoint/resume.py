"""Where a run starts: in a new folder, at its latest good checkpoint, or not at all.

A second start in a folder continues the first. It must be the same run: the same recipe, but for a longer
``train.steps`` and for keys that no number of the run depends on.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.checkpoint.inputs import changes
from rltrain.checkpoint.run_folder import RunFolder, write_atomic
from rltrain.checkpoint.run_state import RunState, latest, read_own, read_verified
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.config.schema import AnyRecipe
from rltrain.errors import RecipeError, UserError

AUTO, NEVER = "auto", "never"
_LENGTHS = ("train.steps", "train.epochs")
# How long one waits and in how many processes, what is written, and what is said: no prompt is drawn,
# sampled, graded or learned from in another way, so the run goes on in the same numbers. reward.seconds and
# reward.memory_gib are not among them (what is over a limit stays ungraded), nor is what stops a run by its
# numbers (rollout.mismatch_stop) or is logged as one (sync, eval).
_FREE = (
    "about",
    "train.deadline_seconds",
    "reward.workers",
    "rollout.environment.workers",
    "rollout.mismatch_warn",
    "checkpoint",
    "report",
)


@dataclass(frozen=True)
class RunStart:
    """What ``opened`` found. checkpoint None: begin with the first step."""

    folder: RunFolder
    checkpoint: Path | None


def is_finished(folder: RunFolder, recipe: AnyRecipe) -> bool:
    """Whether this very recipe ran to its end in ``folder``, whatever its free keys.

    Reads only, so that every rank may ask.
    """
    if not (folder.recipe.is_file() and folder.model.is_dir()):
        return False
    return all(
        is_free(key)
        for key, _, _ in differences(
            _saved_recipe(folder).model_dump(mode="json"), recipe.model_dump(mode="json")
        )
    )


def saved_date(folder: RunFolder, resume: str) -> dt.date | None:
    """The date in the prompts of the run that is to go on; None: there is none, or its prompts have
    no date.
    """
    if resume == NEVER:
        return None
    if folder.recipe.is_file():
        return _saved_recipe(folder).data.date
    if resume == AUTO:
        return None
    saved = read_verified(Path(resume).expanduser().absolute()).recipe["data"].get("date")
    return None if saved is None else dt.date.fromisoformat(saved)


@contextlib.contextmanager
def open_run(
    folder: RunFolder,
    recipe: AnyRecipe,
    resume: str,
    environment: Mapping[str, Any],
    warn: Callable[[str], None],
    inputs: Mapping[str, str] | None = None,
) -> Iterator[RunStart]:
    """The run folder, nobody else's until the block ends, and the checkpoint to go on from; the run's files
    are cut back to it.

    resume: "auto", "never" or a checkpoint's folder. inputs: digests of what this run reads beside the
    recipe; None: not compared. Raises UserError, nothing touched, when the folder holds something else,
    another recipe or (for "never") any run, when a checkpoint named is damaged, and when code, data or models
    are not those of the checkpoint.
    """
    named = None if resume in (AUTO, NEVER) else Path(resume).expanduser().absolute()
    if resume == NEVER or not folder.recipe.is_file():
        state = None
        if named is not None:
            state = _state_of(named, recipe, environment, warn)
            refuse_other_inputs(state, inputs, named, warn)
        RunFolder.create(folder.path, resolved_yaml(recipe), environment)
        with folder.locked():
            if state is not None:
                warn(
                    f"{folder.path} begins with step {state.step + 1}; the lines of the steps before are in "
                    f"the run that {named} is of"
                )
            yield RunStart(folder, named)
        return
    with folder.locked():
        yield RunStart(folder, _reopened(folder, recipe, named, environment, warn, inputs))


def _reopened(
    folder: RunFolder,
    recipe: AnyRecipe,
    named: Path | None,
    environment: Mapping[str, Any],
    warn: Callable[[str], None],
    inputs: Mapping[str, str] | None,
) -> Path | None:
    """The checkpoint that the run in ``folder`` goes on from, with everything later out of the way;
    None: from the start.
    """
    saved = _saved_recipe(folder)
    refuse_other_recipe(
        saved.model_dump(mode="json"), recipe.model_dump(mode="json"), str(folder.recipe), warn
    )
    if named is None:
        found = latest(folder, warn)
    elif named.parent.resolve() == folder.checkpoints.resolve():
        found = named, read_own(folder, named)
    else:
        raise UserError(
            f"{folder.path} holds a run of its own; to go on from {named} elsewhere, choose a new --run"
        )
    if found is None and folder.model.exists():
        raise UserError(
            f"{folder.path} is finished and kept no checkpoint to go on from; "
            f"start a new run from its model: --set model.path={folder.model}"
        )
    step, checkpoint = (0, None) if found is None else (found[1].step, found[0])
    if found is None:
        warn(
            f"the run in {folder.path} ended before its first checkpoint; it starts again from the first step"
        )
    else:
        refuse_other_inputs(found[1], inputs, found[0], warn)
        _warn_of_versions(found[1], environment, warn)
    folder.rewind({} if found is None else found[1].reported)
    for later, path in reversed(folder.present_checkpoints()):
        if later > step:
            aside = path.rename(_free_name(path.with_name(f"unused-{path.name}")))
            warn(f"{path} is not used and now called {aside.name}")
    if folder.model.exists():  # a finished run that is made longer, or goes back to an earlier step
        folder.model.rename(_free_name(folder.path / f"model-{saved.train.length}"))
    if saved != recipe:
        write_atomic(folder.recipe, resolved_yaml(recipe))
    return checkpoint


def _state_of(
    checkpoint: Path, recipe: AnyRecipe, environment: Mapping[str, Any], warn: Callable[[str], None]
) -> RunState:
    """The state in ``checkpoint``, which some other run of the same recipe wrote."""
    state = read_verified(checkpoint)
    refuse_other_recipe(state.recipe, recipe.model_dump(mode="json"), str(checkpoint), warn)
    _warn_of_versions(state, environment, warn)
    return state


def _saved_recipe(folder: RunFolder) -> AnyRecipe:
    try:
        return load_recipe(folder.recipe)
    except RecipeError as error:
        taken = (
            f"run folder {folder.path} already holds a run, whose recipe cannot be read; choose another --run"
        )
        raise UserError("\n".join([taken, *error.problems])) from error


def _free_name(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that nothing has."""
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


# recipes ----------------------------------------------------------------------------------------------------


def is_free(key: str) -> bool:
    """Whether a run may go on with another value of this key."""
    return any(key == one or key.startswith(f"{one}.") for one in _FREE)


def refuse_other_recipe(
    saved: Mapping[str, Any], given: Mapping[str, Any], where: str, warn: Callable[[str], None]
) -> None:
    """Raises UserError with every key that differs, unless the run is only made longer and its schedule does
    not mind.

    Free keys that differ are named in a warning.
    """
    every = list(differences(saved, given))
    found = [one for one in every if not is_free(one[0])]
    free = ", ".join(f"{key}: {_text(before)} -> {_text(now)}" for key, before, now in every if is_free(key))
    only_length = len(found) == 1 and found[0][0] in _LENGTHS and None not in found[0]
    longer = only_length and found[0][2] > found[0][1]
    schedule = given["learner"]["optimizer"]["schedule"]
    if not found or (longer and schedule == "constant"):
        if free:
            warn(f"the run goes on with other settings, on which none of its numbers depends: {free}")
        return
    lines = [f"{key}: {_text(before)} -> {_text(now)}" for key, before, now in found]
    if longer:
        lines.append(
            f"the steps taken had a {schedule} schedule that ends at {found[0][1]}; only a constant one can "
            "go on longer"
        )
    elif only_length:
        lines.append("a run can be made longer, not shorter")
    remedy = "continue it with its own recipe, or choose another --run"
    raise UserError("\n".join([f"{where} was written by another recipe; {remedy} (saved -> given):", *lines]))


def refuse_other_inputs(
    state: RunState, now: Mapping[str, str] | None, checkpoint: Path, warn: Callable[[str], None]
) -> None:
    """Raises UserError naming each file, column and model that is not what the run that wrote
    ``checkpoint`` read.
    """
    if now is None:
        return
    if not state.inputs:
        warn(
            f"{checkpoint} does not say which reward code, answers and models it is of (an older rltrain "
            "wrote it): not compared"
        )
        return
    if lines := changes(state.inputs, now):
        remedy = "put it back as it was, or choose another --run"
        raise UserError(
            "\n".join(
                [
                    f"{checkpoint} was written by a run that read something else; {remedy} (saved -> now):",
                    *lines,
                ]
            )
        )


_ABSENT = object()


def differences(saved: Any, given: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, given value) wherever two recipes as plain data differ; lists of
    unequal length as a whole.
    """
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        for name in {**saved, **given}:
            if name == "sha256":  # of a user's code, which is compared with the run's other inputs
                continue
            yield from differences(
                saved.get(name, _ABSENT), given.get(name, _ABSENT), f"{key}.{name}" if key else name
            )
    elif isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        for index, (before, now) in enumerate(zip(saved, given, strict=True)):
            yield from differences(before, now, f"{key}.{index}")
    elif saved != given:
        yield key, saved, given


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def _warn_of_versions(state: RunState, environment: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Equal results are promised for equal software only."""
    names = ("rltrain", "commit", "python", "packages")
    changed = differences(
        {name: state.environment.get(name) for name in names}, {name: environment.get(name) for name in names}
    )
    lines = [
        f"{key.removeprefix('packages.')} {_text(before)} -> {_text(now)}" for key, before, now in changed
    ]
    if lines:
        warn(
            "the checkpoint was written with other software, so results may differ in rounding: "
            f"{', '.join(lines)}"
        )
