"""vLLM's share of a GPU where a recipe leaves it open (``rollout.vllm.gpu_memory_utilization: auto``)."""

from __future__ import annotations

import torch

from rltrain.build.inputs import REWARD_MODEL
from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.memory import with_utilization
from rltrain.config.capacity.shape import read_shape
from rltrain.config.capacity.workload import workload_of
from rltrain.config.model_config import config_path
from rltrain.config.schema import OnlinePairsRecipe, OnlineRecipe, Rollout, SampledRecipe
from rltrain.learner.ranks import backend_name
from rltrain.learner.trained_model import TrainedModel

__all__ = ["agree_on_share", "rollout_alone", "rollout_beside"]

# Where the plan cannot count a model's parameters, or a model scores completions beside the engine.
_UNKNOWN = 0.45


def rollout_beside(recipe: OnlineRecipe | OnlinePairsRecipe, trained: TrainedModel) -> Rollout:
    """``recipe.rollout`` with the share that ``trained`` and the recipe's frozen models leave. A collective.

    The plan counts what they will hold, moments included, which do not exist yet; on every rank vLLM gets
    the least of the ranks' free memory, since ranks may hold an engine together.
    """
    rollout = recipe.rollout
    is_open = rollout.engine == "vllm" and rollout.vllm.gpu_memory_utilization == "auto"
    if not is_open or trained.device.type == "cpu":
        return rollout
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(trained.device)
    cluster = Cluster(trained.world_size, total, Backend(backend_name(trained.accelerator)))
    shares = trained.gather([agree_on_share(recipe, cluster, free)])
    return _with_share(rollout, min(shares))


def agree_on_share(recipe: OnlineRecipe | OnlinePairsRecipe, cluster: Cluster, free: int) -> float:
    """The share of a GPU, in hundredths, that the plan leaves vLLM and that is free.

    free: bytes, once the learner is loaded.
    """
    share = _UNKNOWN
    try:
        load = workload_of(recipe, lambda path, revision: read_shape(config_path(path, revision)))
    except LookupError:
        pass
    else:
        engine = with_utilization(load, cluster).engine
        assert engine is not None and engine.utilization is not None
        share = engine.utilization
    return min(share, 100 * free // cluster.gpu_bytes / 100)


def rollout_alone(recipe: SampledRecipe) -> Rollout:
    """``recipe.rollout`` where no learner runs: vLLM shares the GPU with reward models only."""
    rollout = recipe.rollout
    scores = any(ref.name == REWARD_MODEL for ref in recipe.reward.functions)
    if rollout.vllm.gpu_memory_utilization != "auto":
        return rollout
    return _with_share(rollout, _UNKNOWN if scores else rollout.vllm.utilization_alone)


def _with_share(rollout: Rollout, share: float) -> Rollout:
    return rollout.model_copy(
        update={"vllm": rollout.vllm.model_copy(update={"gpu_memory_utilization": share})}
    )
