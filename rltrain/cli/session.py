"""Shared by the commands: deadlines, user errors, joining of ranks, an engine for a model on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rltrain.build.engine_share import rollout_alone
from rltrain.build.engines import build_engine, build_sampler
from rltrain.build.rollout import load_from_disk
from rltrain.config.schema import SampledRecipe
from rltrain.data.tokenization import Tokenization
from rltrain.errors import user_mistakes
from rltrain.learner.ranks import connect, open_heartbeat_board, this_process
from rltrain.process import Process
from rltrain.protocols import Sampler
from rltrain.watchdog import Watchdog


@contextmanager
def user_errors(deadline_seconds: float) -> Iterator[None]:
    """A context for the time before this process joins other ranks: a mistake of the user's becomes one
    line, and the deadline also ends a wait for rewards that never answer.
    """
    with Watchdog(deadline_seconds, rank_name()), user_mistakes():
        yield


@contextmanager
def joined_processes(deadline_seconds: float) -> Iterator[tuple[Process, Watchdog]]:
    """Joins the other ranks, if there are any. In this context every wait has the recipe's deadline."""
    connect(deadline_seconds)
    with Watchdog(deadline_seconds, rank_name(), open_heartbeat_board()) as watchdog:
        yield this_process(watchdog.waiting), watchdog


def rank_name() -> str:
    return f"rank {os.environ.get('RANK', '0')}"


def is_main_process() -> bool:
    """Whether the launcher made this process rank 0; usable before the ranks are joined."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def sampler_for_model(
    recipe: SampledRecipe, tokenization: Tokenization, process: Process
) -> Iterator[Sampler]:
    """A sampler for the recipe's model: the engine with the weights on disk; with an environment it samples
    whole episodes.

    Every weight is compared after loading and after sampling. Raises WeightMismatchError.
    """
    name = recipe.rollout.engine
    with process.deadline(f"the {name} engine", "to start"):
        engine = build_engine(
            recipe.model,
            recipe.data,
            rollout_alone(recipe),
            recipe.learner.precision,
            tokenization,
            process,
            truncation=recipe.eval.truncates,
        )
    sampler = build_sampler(recipe.data, recipe.rollout, engine, tokenization)
    try:
        sync = load_from_disk(engine, recipe.model, recipe.sync, recipe.seed, process.deadline)
        yield sampler
        sync.verify(every=True)
    finally:
        with process.deadline(f"the {name} engine", "to close"):
            sampler.close()
            engine.close()
