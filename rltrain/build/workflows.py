"""The table of workflows: the functions that load, build, train and describe each kind of recipe.

Other modules do not branch on a recipe's kind.
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
from rltrain.config.schema import AnyRecipe, OfflineRecipe, OnlinePairsRecipe, OnlineRecipe
from rltrain.learner.ranks import mixed_precision
from rltrain.train.doctor import online_with_every_row_trained, pairs_with_every_row_trained
from rltrain.train.loop import TrainingRun
from rltrain.train.offline import train_offline
from rltrain.train.online import train_online
from rltrain.train.online_pairs import train_pairs

__all__ = ["WORKFLOWS", "Workflow", "workflow_for"]


@dataclass(frozen=True)
class Workflow:
    """One kind of recipe, from its inputs to its finished model.

    ``inputs`` are returned by ``load``, ``run`` by ``build``.
    """

    # (recipe) -> inputs; raises ValueError or OSError for a mistake that the user can correct
    load: Callable[[Any], Any]
    # (inputs) -> the resources that must be released at the end
    resources: Callable[[Any], AbstractContextManager[object]]
    # (inputs) -> lines that describe them
    summarize: Callable[[Any], Iterator[str]]
    # (recipe, inputs, context) -> run; loads weights
    build: Callable[[Any, Any, RunContext], TrainingRun]
    # (run) -> folder of the finished model
    train: Callable[[Any], Path]
    # (recipe at learning rate 0) -> the recipe with every row in the gradient pass
    with_every_row_trained: Callable[[Any], Any]
    samples: bool  # whether the policy writes the completions
    uses_judge: bool = False  # whether a judge makes pairs of the completions


def _load_online(recipe: OnlineRecipe) -> RunInputs:
    return load_inputs(recipe, process_reward_models(recipe.process_reward))


def _load_pairs(recipe: OnlinePairsRecipe) -> RunInputs:
    return load_inputs(recipe)


def _grader_processes(inputs: RunInputs) -> AbstractContextManager[object]:
    return inputs.grader


def _no_resources(inputs: OfflineInputs) -> AbstractContextManager[object]:
    del inputs
    return nullcontext()


def _same_recipe(recipe: OfflineRecipe) -> OfflineRecipe:
    return recipe


_OFFLINE = Workflow(
    load=load_offline_inputs,
    resources=_no_resources,
    summarize=summarize_offline,
    build=build_offline_run,
    train=train_offline,
    with_every_row_trained=_same_recipe,
    samples=False,
)
WORKFLOWS: dict[str, Workflow] = {
    "online": Workflow(
        load=_load_online,
        resources=_grader_processes,
        summarize=summarize,
        build=build_online_run,
        train=train_online,
        with_every_row_trained=online_with_every_row_trained,
        samples=True,
    ),
    "online_pairs": Workflow(
        load=_load_pairs,
        resources=_grader_processes,
        summarize=summarize,
        build=build_pair_run,
        train=train_pairs,
        with_every_row_trained=pairs_with_every_row_trained,
        samples=True,
        uses_judge=True,
    ),
    "offline": _OFFLINE,
    "sft": _OFFLINE,
}


def workflow_for(recipe: AnyRecipe) -> Workflow:
    """Raises UserError if this machine cannot compute in the recipe's precision."""
    mixed_precision(recipe.learner.precision)
    return WORKFLOWS[recipe.kind]
