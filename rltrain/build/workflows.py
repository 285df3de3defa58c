"""The table of workflows: what each kind of recipe loads, builds, trains and describes.

The only place that asks for the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.build.context import RunContext
from rltrain.build.inputs import RunInputs, load_inputs, process_reward_models, summarize
from rltrain.build.offline import OfflineInputs, build_offline_run, load_offline_inputs, summarize_offline
from rltrain.build.online import build_online_run
from rltrain.build.online_pairs import build_pair_run
from rltrain.config.schema import AnyRecipe, OfflineRecipe, OnlinePairsRecipe, OnlineRecipe, SampledRecipe
from rltrain.errors import UserError
from rltrain.learner.ranks import mixed_precision
from rltrain.train.doctor import online_at_rest, pairs_at_rest
from rltrain.train.loop import TrainingRun
from rltrain.train.offline import train_offline
from rltrain.train.online import train_online
from rltrain.train.online_pairs import train_pairs

__all__ = ["WORKFLOWS", "Workflow", "require_sampled", "workflow_for"]


@dataclass(frozen=True)
class Workflow:
    """One kind of recipe, from its inputs to its finished model.

    ``inputs`` is what ``load`` returns, ``run`` what ``build`` does.
    """

    load: Callable[[Any], Any]  # (recipe) -> inputs; raises ValueError or OSError for what a user can mend
    held: Callable[[Any], AbstractContextManager[object]]  # (inputs) -> what must be released at the end
    summarize: Callable[[Any], Iterator[str]]  # (inputs) -> lines about them
    build: Callable[[Any, Any, RunContext], TrainingRun]  # (recipe, inputs, context) -> run; loads weights
    train: Callable[[Any], Path]  # (run) -> folder of the finished model
    at_rest: Callable[
        [Any], Any
    ]  # (recipe at learning rate 0) -> one whose every row takes part in the gradient pass
    samples: bool  # whether the policy writes the completions
    judged: bool = False  # whether a judge makes pairs of them


def _load_online(recipe: OnlineRecipe) -> RunInputs:
    return load_inputs(recipe, process_reward_models(recipe.process_reward))


def _load_pairs(recipe: OnlinePairsRecipe) -> RunInputs:
    return load_inputs(recipe)


def _grader(inputs: RunInputs) -> AbstractContextManager[object]:
    return inputs.grader


def _nothing(inputs: OfflineInputs) -> AbstractContextManager[object]:
    del inputs
    return nullcontext()


def _unchanged(recipe: OfflineRecipe) -> OfflineRecipe:
    return recipe


WORKFLOWS: dict[str, Workflow] = {
    "online": Workflow(
        load=_load_online,
        held=_grader,
        summarize=summarize,
        build=build_online_run,
        train=train_online,
        at_rest=online_at_rest,
        samples=True,
    ),
    "online_pairs": Workflow(
        load=_load_pairs,
        held=_grader,
        summarize=summarize,
        build=build_pair_run,
        train=train_pairs,
        at_rest=pairs_at_rest,
        samples=True,
        judged=True,
    ),
    "offline": Workflow(
        load=load_offline_inputs,
        held=_nothing,
        summarize=summarize_offline,
        build=build_offline_run,
        train=train_offline,
        at_rest=_unchanged,
        samples=False,
    ),
}


def workflow_for(recipe: AnyRecipe) -> Workflow:
    """Raises UserError where this machine cannot compute in the recipe's precision."""
    mixed_precision(recipe.learner.precision)
    return WORKFLOWS[recipe.kind]


def require_sampled(recipe: AnyRecipe, why: str) -> SampledRecipe:
    """``recipe`` as one whose completions the policy samples. Raises UserError with ``why`` for any other."""
    if not isinstance(recipe, SampledRecipe):
        raise UserError(why)
    return recipe
