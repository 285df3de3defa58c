"""One optimizer update, whatever the loss: the only place that runs a backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.learner.backend import set_mode
from rltrain.learner.micro_batches import MicroBatches
from rltrain.learner.packing import MicroBatch
from rltrain.learner.passes import write_rows
from rltrain.learner.trained_model import TrainedModel
from rltrain.loss.objective import ObjectiveShare
from rltrain.seeds import stable_hash

__all__ = ["LossFunction", "UpdateResult", "optimizer_batches", "optimizer_update"]

# (micro-batch, the model's statistics of it) -> its share of the update's loss and metrics.
LossFunction = Callable[[MicroBatch, Mapping[str, Tensor]], ObjectiveShare]


@dataclass(frozen=True)
class UpdateResult:
    """The result of one optimizer update, equal on every rank."""

    metrics: dict[str, float]  # "loss/total", the loss's own metrics, "learner/grad_norm" before clipping
    stepped: bool  # False: dropped for a non-finite loss or gradient


def optimizer_update(
    trained: TrainedModel,
    micro_batches: MicroBatches,
    loss_of: LossFunction,
    *,
    wants: frozenset[str],
    temperature: float = 1.0,
    record: Mapping[str, Tensor] | None = None,
) -> UpdateResult:
    """Add up the gradients of all ranks' micro-batches and take one optimizer step. A collective.

    loss_of: a micro-batch's share of the update's loss and metrics; the shares of all micro-batches and ranks
    are summed. wants: statistics that the gradient pass computes. record: (B, T) tensors by statistic, which
    receive this rank's values from before the step. Raises NonFiniteError after ``max_nonfinite`` dropped
    updates in a row.
    """
    loss = torch.zeros((), device=trained.device)
    metric_sums: dict[str, Tensor] = {}
    set_mode(trained.wrapped_model, training=True)

    for number, micro_batch in enumerate(micro_batches, start=1):
        with trained.backend.micro_batch(last=number == len(micro_batches)):
            statistics = trained.forward(micro_batch, temperature=temperature, wants=wants)
            share = loss_of(micro_batch, statistics)
            _accumulate_gradient(trained, share.loss, statistics)
        loss += share.loss.detach()
        for name, value in share.metrics.items():
            metric_sums[name] = metric_sums.get(name, 0.0) + value
        for name, result in (record or {}).items():
            write_rows(result, micro_batch, statistics[name])

    metrics = trained.sum_scalars({"loss/total": loss, **metric_sums})
    metrics["learner/grad_norm"], stepped = trained.step(metrics["loss/total"])
    return UpdateResult(metrics, stepped)


def _accumulate_gradient(trained: TrainedModel, loss: Tensor, statistics: Mapping[str, Tensor]) -> None:
    """Add the gradient of a micro-batch's share of the loss; call it inside ``backend.micro_batch``.

    A share that is not finite makes the whole gradient not finite, on every rank, so that ``step`` need test
    only the gradient's norm.
    """
    poison = torch.where(loss.detach().isfinite(), 1.0, math.nan)

    # The loss of an empty micro-batch need not depend on the model, but its backward pass must run all the
    # same: it takes part in the collectives of the other ranks' passes.
    statistic = next(values for values in statistics.values() if values.requires_grad)
    connected = loss + 0.0 * statistic.sum()

    # DDP, FSDP and DeepSpeed average gradients over ranks: undo it.
    trained.backend.backward(connected * poison * trained.world_size)


def optimizer_batches(trained: TrainedModel, group: Tensor, updates: int, epoch: int) -> list[Tensor]:
    """Row positions of ``updates`` optimizer batches of whole groups, shuffled by version and epoch.

    group: (B,) ids. A step with fewer groups than updates, which dynamic sampling may cause, has one update
    per group.
    """
    ids = torch.unique(group)
    parts = min(updates, len(ids))
    if parts == 1:
        return [torch.arange(len(group))]
    generator = torch.Generator().manual_seed(stable_hash(trained.seed, "split", trained.version, epoch))
    shuffled = ids[torch.randperm(len(ids), generator=generator)]
    return [torch.nonzero(torch.isin(group, part)).flatten() for part in shuffled.tensor_split(parts)]
