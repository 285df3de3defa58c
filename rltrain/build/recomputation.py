"""Which layers a learner computes again where a recipe leaves it open (``gradient_checkpointing: auto``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.memory import with_recomputation, with_utilization
from rltrain.config.capacity.shape import read_shape
from rltrain.config.capacity.workload import workload_of
from rltrain.config.model_config import config_path
from rltrain.config.schema import AnyRecipe
from rltrain.learner.ranks import backend_name
from rltrain.learner.trained_model import TrainedModel

__all__ = ["recompute_what_must_be"]


def recompute_what_must_be(recipe: AnyRecipe, models: Sequence[TrainedModel]) -> None:
    """Keep the activations of as many layers as the plan has room for, in every model that the run trains.

    Models compute all layers again where the plan cannot count them, and on a CPU.
    """
    policy = models[0]
    if recipe.learner.gradient_checkpointing != "auto" or policy.device.type == "cpu":
        return
    total = torch.cuda.mem_get_info(policy.device)[1]
    share = recomputed_share(
        recipe, Cluster(policy.world_size, total, Backend(backend_name(policy.accelerator)))
    )
    for model in models:
        model.recompute(share)


def recomputed_share(recipe: AnyRecipe, cluster: Cluster) -> float:
    """Of the layers; 1 where the plan cannot count the policy's parameters."""
    try:
        load = workload_of(recipe, lambda path, revision: read_shape(config_path(path, revision)))
    except LookupError:
        return 1.0
    share = with_recomputation(with_utilization(load, cluster), cluster).recomputed
    assert share is not None
    return share
