"""Builds a run whose rollouts come from the journal of another: no engine, no rewards, no data set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.build.context import RunContext
from rltrain.build.inputs import RunInputs
from rltrain.build.rollout import RolloutParts, build_evaluator
from rltrain.build.workflows import WORKFLOWS
from rltrain.checkpoint.journal import Journal, StepHeader
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.saved_recipe import differences
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlinePairsRecipe, OnlineRecipe
from rltrain.control import TOKEN_CONTROLS
from rltrain.data.prompts import PromptSet
from rltrain.data.tokenization import load_tokenization
from rltrain.errors import UserError
from rltrain.learner.trained_model import ModelOwner
from rltrain.needs import ROLLOUT_LOGP
from rltrain.process import Process
from rltrain.train.mismatch import MismatchGuard
from rltrain.train.replayed import NoPush, ReplayedRollouts
from rltrain.train.sampled_run import SampledRun

__all__ = ["Replay", "build_replay", "plan_replay"]

# what a replay may change: how the policy learns from its samples, not how they came about
_CHANGEABLE = (
    *("advantage", "control", "loss", "learner", "process_reward", "pairs.choose", "pairs.verdict"),
    *("pairs.tolerance", "model.reference", "model.teacher", "rollout.trust_logp", "report"),
    *("train.deadline_seconds", "train.profile"),
)


@dataclass(frozen=True)
class Replay:
    """What is replayed. changes: of the recipe, (key, before, now). checkpoint: where to start; None: with
    the model. digests: of the run's weights by version; empty where the method is another one.
    """

    folder: RunFolder
    recipe: OnlineRecipe | OnlinePairsRecipe
    steps: range
    checkpoint: Path | None
    changes: tuple[tuple[str, Any, Any], ...]
    digests: Mapping[int, str]
    warnings: tuple[str, ...]
    environment: Mapping[str, Any]  # the software that wrote the journal

    @property
    def is_other_method(self) -> bool:
        return bool(self.changes)

    @property
    def is_whole_run(self) -> bool:
        """Whether it ends with the run's last step, so that the finished models can be compared."""
        return self.steps[-1] == self.recipe.train.steps and self.folder.model.is_dir()


def plan_replay(run: Path, steps: tuple[int, int] | None, overrides: tuple[str, ...]) -> Replay:
    """Checks everything that can be checked before a model is loaded. steps: the first and the last; None:
    all. Raises UserError and RecipeError.
    """
    folder = RunFolder.from_path(run)
    if not folder.recipe.is_file():
        raise UserError(f"{folder.path} is no run folder: {folder.recipe.name} is missing")
    saved = load_recipe(folder.recipe)
    changed = load_recipe(folder.recipe, overrides=overrides)
    if not isinstance(saved, OnlineRecipe | OnlinePairsRecipe) or type(changed) is not type(saved):
        raise UserError(f"{folder.path} trained on data, not on samples: rltrain train repeats it")
    journal = Journal(folder)
    written = journal.steps()
    if not written:
        raise UserError(
            f"{folder.path} has no journal ({folder.rollouts.name}/): nothing was sampled, or the run kept "
            "nothing (journal.keep)"
        )
    first, last = steps or (written[0], written[-1])
    _require_files(journal, written, first, last)

    changes = tuple(differences(saved.model_dump(mode="json"), changed.model_dump(mode="json")))
    _require_changeable(changes)
    if changes:
        changed = _with_sampled_ratio(changed, overrides)
    quiet = {"checkpoint": changed.checkpoint.model_copy(update={"every": 0, "format": "whole"})}
    checked = check(changed.model_copy(update={**quiet, "push": None}))
    headers = [journal.read_header(step) for step in written]
    recipe: Any = checked.recipe
    return Replay(
        folder=folder,
        recipe=recipe,
        steps=range(first, last + 1),
        checkpoint=_find_start(folder, first),
        changes=changes,
        digests={} if changes else _digests_by_version(headers),
        warnings=checked.warnings,
        environment=headers[-1].environment,
    )


def _require_files(journal: Journal, written: list[int], first: int, last: int) -> None:
    missing = [step for step in range(first, last + 1) if step not in written]
    if first > last or missing:
        lacking = f"; step {missing[0]} has no file" if missing else ""
        raise UserError(
            f"--steps {first}..{last}: {journal.folder.rollouts} has steps {written[0]} to {written[-1]}"
            f"{lacking}; name steps that have files, the first not after the last"
        )


def _require_changeable(changes: tuple[tuple[str, Any, Any], ...]) -> None:
    refused = [key for key, _, _ in changes if not key.startswith(_CHANGEABLE)]
    if refused:
        raise UserError(
            f"replay --set {refused[0]}: the samples are there already, so that only the method may change: "
            f"{', '.join(_CHANGEABLE)}"
        )


def _with_sampled_ratio(recipe: Any, overrides: tuple[str, ...]) -> Any:
    """The samples are another policy's: the ratio is that to the policy that wrote them, unless a control
    corrects for it or the user decides.
    """
    if not isinstance(recipe, OnlineRecipe) or any("rollout.trust_logp" in text for text in overrides):
        return recipe
    if any(ROLLOUT_LOGP in TOKEN_CONTROLS.bind(ref.name, ref.hp).needs for ref in recipe.control):
        return recipe
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"trust_logp": True})})


def _find_start(folder: RunFolder, first: int) -> Path | None:
    """The checkpoint before step ``first``; None: the model with which the run began."""
    if first == 1:
        return None
    present = [step for step, _ in folder.present_checkpoints()]
    if first - 1 not in present:
        after = ", ".join(f"{step + 1}" for step in present) or "none"
        raise UserError(
            f"--steps {first}..: a replay starts with step 1 or after a checkpoint, and there is none of "
            f"step {first - 1}; first steps that can be replayed: 1, and after checkpoints {after}"
        )
    return folder.checkpoint(first - 1)


def _digests_by_version(headers: list[StepHeader]) -> dict[int, str]:
    return {header.version: header.weights for header in headers}


def build_replay(replay: Replay, folder: RunFolder, process: Process) -> SampledRun:
    """Loads the weights. folder: of the replay, which exists."""
    recipe = replay.recipe
    tokenization = load_tokenization(recipe.model, recipe.data, recipe.rollout)
    no_rewards: Any = None  # the scores are in the journal
    inputs = RunInputs(tokenization, PromptSet(()), None, no_rewards)

    versions = frozenset(Journal(replay.folder).evaluated_versions())
    evaluator = None
    if versions and not replay.is_other_method:
        evaluator = build_evaluator(
            recipe.eval, recipe.reward, recipe.rollout.max_tokens, recipe.seed, (), versions
        )

    def parts(learner: ModelOwner) -> RolloutParts:
        source = ReplayedRollouts(Journal(replay.folder), process, replay.digests, learner.weights_digest)
        return RolloutParts(source, NoPush(), evaluator, MismatchGuard(math.inf, math.inf, 2**31))

    context = RunContext(folder, replay.checkpoint, process, replayed=parts)
    run: Any = WORKFLOWS[recipe.kind].build(recipe, inputs, context)
    return dataclasses.replace(run, total_steps=replay.steps[-1])
