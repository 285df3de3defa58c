"""How rollouts reach the learner: written to the journal, and sampled ahead where the recipe says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rltrain.build.context import RunContext
from rltrain.build.inputs import REWARD_MODEL
from rltrain.checkpoint.journal import Journal, WaitingGroups
from rltrain.checkpoint.journal_table import require_columns
from rltrain.checkpoint.run_folder import describe_environment
from rltrain.config.rules.registries import EXTRA_SAMPLES
from rltrain.config.schema import Journal as JournalSettings
from rltrain.config.schema import OnlineRecipe, Rollout
from rltrain.data.prompts import PromptSet
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.trained_model import ModelOwner
from rltrain.needs import REFERENCE_WEIGHTS
from rltrain.process import Process
from rltrain.protocols import RolloutEngine
from rltrain.rollout.colocated import ColocatedRollouts
from rltrain.rollout.controller import ControlledRollouts
from rltrain.rollout.source import PromptedSource
from rltrain.rollout.window import Window
from rltrain.timeline import Timeline
from rltrain.train.bounded import BoundedRollouts
from rltrain.train.journaled import JournaledRollouts
from rltrain.train.lagged import LaggedRollouts

if TYPE_CHECKING:
    from rltrain.rollout.engines.vllm_pool import VllmPool

__all__ = ["WeightsDigest", "add_bound", "add_journal", "add_lag", "can_overlap"]


def add_journal(
    source: PromptedSource,
    settings: JournalSettings,
    context: RunContext,
    digest: WeightsDigest,
    held_out: PromptSet | None = None,
) -> PromptedSource:
    """``source``, whose rollouts are on the disk before they are trained on, unless the recipe wants none."""
    if settings.keep == "nothing":
        return source
    with user_mistakes():
        require_columns([*(source.prompts or ()), *(held_out.prompts if held_out else ())])
    return JournaledRollouts(
        source,
        Journal(context.folder, settings.keep),
        context.process,
        digest,
        settings=json.dumps(context.digests, sort_keys=True),
        environment=describe_environment(),
    )


@dataclass
class WeightsDigest:
    """The digest of the learner's weights, computed once for each version."""

    learner: ModelOwner
    _known: tuple[int, str] | None = None

    def __call__(self) -> str:
        version = self.learner.version
        if self._known is None or self._known[0] != version:
            self._known = version, self.learner.weights_digest()
        return self._known[1]


def add_bound(
    source: ColocatedRollouts,
    engine: RolloutEngine,
    rollout: Rollout,
    steps: int,
    context: RunContext,
    digest: WeightsDigest,
) -> PromptedSource:
    """The groups of ``source``, sampled without a break on ``engine``, which no other rank uses; ``source``
    itself under another schedule.

    steps: of the run. Raises UserError where there are several ranks.
    """
    settings = rollout.bound
    if settings is None:
        return source
    if context.process.world_size > 1:
        raise UserError(
            f"rollout.schedule bounded needs one rank, and there are {context.process.world_size}: a worker "
            "that comes back is sent the weights at any time, which several ranks would have to gather "
            "together; start one rank, or use {lag: k}"
        )
    pool = cast("VllmPool", engine)
    source.engine_notes = pool.note_workers
    return BoundedRollouts(
        inner=source,
        engine=pool.run_freely(Timeline(context.folder.timeline)),
        window=Window(settings.versions, source.groups_per_step, settings.when_stale == "wait"),
        waiting=WaitingGroups(context.folder, json.dumps(context.digests, sort_keys=True)),
        steps=steps,
        weights_digest=digest,
    )


def add_lag(source: PromptedSource, recipe: OnlineRecipe, process: Process) -> PromptedSource:
    """``source`` under ``rollout.schedule``; unchanged in a replay, where nothing is journaled, and where
    workers sample without a break.
    """
    if not isinstance(source, JournaledRollouts) or recipe.rollout.bound is not None:
        return source
    lag = recipe.rollout.lag
    is_controlled = isinstance(source.inner, ControlledRollouts)
    overlaps = lag > 0 and (is_controlled or can_overlap(recipe, process))
    return LaggedRollouts(source, lag, recipe.train.steps, overlaps, has_thread=not is_controlled)


def can_overlap(recipe: OnlineRecipe, process: Process) -> bool:
    """Whether a thread can sample while the learner goes on: nothing that it does needs the learner, its
    device or another rank. The samples are the same either way.
    """
    rollout = recipe.rollout
    needs_learner = any(
        REFERENCE_WEIGHTS in EXTRA_SAMPLES.spec(ref.name).needs_with(ref.hp) for ref in rollout.extra_samples
    )
    scores_here = any(ref.name == REWARD_MODEL for ref in recipe.reward.functions)
    is_apart = rollout.engine == "vllm_server" and process.world_size == 1
    return is_apart and not needs_learner and not scores_here
