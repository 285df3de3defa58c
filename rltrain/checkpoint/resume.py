"""Where a run starts: in a new folder, at its latest usable checkpoint, or not at all.

A second start in a folder continues the first run. It must be the same run: the same recipe, except for a
longer ``train.steps`` and for keys on which no number of the run depends.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.checkpoint.inputs import changes
from rltrain.checkpoint.run_folder import RunFolder, write_atomic
from rltrain.checkpoint.run_state import RunState, latest, read_own, read_verified, restoring
from rltrain.checkpoint.saved_recipe import (
    AUTO,
    NEVER,
    describe_value,
    differences,
    is_free,
    read_saved_recipe,
    refuse_other_recipe,
)
from rltrain.config.load import resolved_yaml
from rltrain.config.schema import AnyRecipe
from rltrain.errors import UserError


@dataclass(frozen=True)
class RunStart:
    """The result of ``open_run``. checkpoint: where to continue; None: begin with the first step."""

    folder: RunFolder
    checkpoint: Path | None


def is_finished(folder: RunFolder, recipe: AnyRecipe) -> bool:
    """Whether this recipe, apart from its free keys, ran to its end in ``folder``.

    Only reads, so that every rank may call it.
    """
    if not (folder.recipe.is_file() and folder.model.is_dir()):
        return False
    saved = read_saved_recipe(folder).model_dump(mode="json")
    changed = differences(saved, recipe.model_dump(mode="json"))
    return all(is_free(key) for key, _, _ in changed)


def saved_date(folder: RunFolder, resume: str) -> dt.date | None:
    """The date in the prompts of the run to continue; None: there is no such run, or its prompts have no
    date.
    """
    if resume == NEVER:
        return None
    if folder.recipe.is_file():
        return read_saved_recipe(folder).data.date
    if resume == AUTO:
        return None
    checkpoint = Path(resume).expanduser().absolute()
    state = read_verified(checkpoint)
    with restoring(checkpoint):
        saved = state.recipe["data"].get("date")
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
    """Yields the run folder, locked until the block ends, and the checkpoint to continue from; cuts the run's
    files back to it.

    resume: "auto", "never" or a checkpoint's folder. inputs: digests of the inputs other than the recipe;
    None: not compared. Raises UserError, and changes nothing, when the folder holds something else, another
    recipe or (for "never") any run, when the checkpoint in ``resume`` is damaged, and when code, data or
    models are not those of the checkpoint.
    """
    named = None if resume in (AUTO, NEVER) else Path(resume).expanduser().absolute()
    if resume == NEVER or not folder.recipe.is_file():
        state = None
        if named is not None:
            state = _load_state(named, recipe, environment, warn)
            refuse_other_inputs(state, inputs, named, warn)
        RunFolder.create(folder.path, resolved_yaml(recipe), environment)
        with folder.lock():
            if state is not None:
                warn(
                    f"{folder.path} begins with step {state.step + 1}; the lines of the steps before are in "
                    f"the run that {named} is of"
                )
            yield RunStart(folder, named)
        return
    with folder.lock():
        yield RunStart(folder, _reopen(folder, recipe, named, environment, warn, inputs))


def _reopen(
    folder: RunFolder,
    recipe: AnyRecipe,
    named: Path | None,
    environment: Mapping[str, Any],
    warn: Callable[[str], None],
    inputs: Mapping[str, str] | None,
) -> Path | None:
    """The checkpoint from which the run in ``folder`` continues; None: from the first step.

    Cuts the run's files back to it, and renames later checkpoints and a finished model.
    """
    saved = read_saved_recipe(folder)
    saved_fields = saved.model_dump(mode="json")
    refuse_other_recipe(saved_fields, recipe.model_dump(mode="json"), str(folder.recipe), warn)
    if named is None:
        start = latest(folder, warn)
    elif named.parent.resolve() == folder.checkpoints.resolve():
        start = named, read_own(folder, named)
    else:
        raise UserError(
            f"{folder.path} holds a run of its own; to go on from {named} elsewhere, choose a new --run"
        )
    if start is None and folder.model.exists():
        raise UserError(
            f"{folder.path} is finished and kept no checkpoint to go on from; "
            f"start a new run from its model: --set model.path={folder.model}"
        )

    checkpoint, state = (None, None) if start is None else start
    if checkpoint is None or state is None:
        warn(
            f"the run in {folder.path} ended before its first checkpoint; it starts again from the first step"
        )
    else:
        refuse_other_inputs(state, inputs, checkpoint, warn)
        _warn_of_versions(state, environment, warn)

    folder.rewind({} if state is None else state.reported)
    step = 0 if state is None else state.step
    for later, path in reversed(folder.present_checkpoints()):
        if later > step:
            renamed = path.rename(_free_name(path.with_name(f"unused-{path.name}")))
            warn(f"{path} is not used and now called {renamed.name}")
    if folder.model.exists():  # a finished run that is made longer, or goes back to an earlier step
        folder.model.rename(_free_name(folder.path / f"model-{saved.train.length}"))
    if saved != recipe:
        write_atomic(folder.recipe, resolved_yaml(recipe))
    return checkpoint


def _load_state(
    checkpoint: Path, recipe: AnyRecipe, environment: Mapping[str, Any], warn: Callable[[str], None]
) -> RunState:
    """The state in ``checkpoint``, written by another run of the same recipe."""
    state = read_verified(checkpoint)
    refuse_other_recipe(state.recipe, recipe.model_dump(mode="json"), str(checkpoint), warn)
    _warn_of_versions(state, environment, warn)
    return state


def _free_name(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist yet."""
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


def refuse_other_inputs(
    state: RunState, now: Mapping[str, str] | None, checkpoint: Path, warn: Callable[[str], None]
) -> None:
    """Raises UserError naming each file, column and model that differs from the inputs of the run that wrote
    ``checkpoint``.
    """
    if now is None:
        return
    if not state.inputs:
        warn(
            f"{checkpoint} does not record its reward code, answers and models (an older rltrain "
            "wrote it): not compared"
        )
        return
    if lines := changes(state.inputs, now):
        remedy = "put it back as it was, or choose another --run"
        refusal = f"{checkpoint} was written by a run that read something else; {remedy} (saved -> now):"
        raise UserError("\n".join([refusal, *lines]))


def _warn_of_versions(state: RunState, environment: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Warn where the checkpoint was written with other software: only equal software gives equal results."""
    names = ("rltrain", "commit", "python", "packages")
    changed = differences(
        {name: state.environment.get(name) for name in names}, {name: environment.get(name) for name in names}
    )
    lines = [
        f"{key.removeprefix('packages.')} {describe_value(before)} -> {describe_value(now)}"
        for key, before, now in changed
    ]
    if lines:
        warn(
            "the checkpoint was written with other software, so results may differ in rounding: "
            f"{', '.join(lines)}"
        )
