"""How rollouts reach the learner: written to the journal, and sampled ahead where the recipe says so."""

from __future__ import annotations

import json

from rltrain.build.context import RunContext
from rltrain.build.inputs import REWARD_MODEL
from rltrain.checkpoint.journal import Journal
from rltrain.checkpoint.journal_table import require_columns
from rltrain.checkpoint.run_folder import describe_environment
from rltrain.config.rules.registries import EXTRA_SAMPLES
from rltrain.config.schema import Journal as JournalSettings
from rltrain.config.schema import OnlineRecipe
from rltrain.errors import user_mistakes
from rltrain.learner.trained_model import ModelOwner
from rltrain.needs import REFERENCE_WEIGHTS
from rltrain.process import Process
from rltrain.rollout.source import PromptedSource
from rltrain.train.journaled import JournaledRollouts
from rltrain.train.lagged import LaggedRollouts

__all__ = ["add_journal", "add_lag", "can_overlap"]


def add_journal(
    source: PromptedSource, settings: JournalSettings, context: RunContext, learner: ModelOwner
) -> PromptedSource:
    """``source``, whose rollouts are on the disk before they are trained on, unless the recipe wants none."""
    if settings.keep == "nothing":
        return source
    with user_mistakes():
        require_columns(source.prompts or ())
    return JournaledRollouts(
        source,
        Journal(context.folder, settings.keep),
        context.process,
        learner.weights_digest,
        settings=json.dumps(context.digests, sort_keys=True),
        environment=describe_environment(),
    )


def add_lag(source: PromptedSource, recipe: OnlineRecipe, process: Process) -> PromptedSource:
    """``source`` under ``rollout.schedule``; unchanged in a replay, and where nothing is journaled."""
    if not isinstance(source, JournaledRollouts):
        return source
    lag = recipe.rollout.lag
    return LaggedRollouts(source, lag, recipe.train.steps, overlaps=lag > 0 and can_overlap(recipe, process))


def can_overlap(recipe: OnlineRecipe, process: Process) -> bool:
    """Whether a thread can sample while the learner goes on: nothing that it does needs the learner, its
    device or another rank. The samples are the same either way.
    """
    rollout = recipe.rollout
    needs_learner = any(
        REFERENCE_WEIGHTS in EXTRA_SAMPLES.spec(ref.name).needs_with(ref.hp) for ref in rollout.extra_samples
    )
    scores_here = any(ref.name == REWARD_MODEL for ref in recipe.reward.functions)
    is_apart = rollout.engine == "vllm_server" and process.world_size == 1 and recipe.model.adapter is None
    return is_apart and not needs_learner and not scores_here
