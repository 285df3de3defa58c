"""The advantage stage: a registered estimator applied to a step's batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.registry import BoundMethod
from rltrain.types.policy import TrainBatch


def compute_advantages(batch: TrainBatch, estimator: BoundMethod) -> TrainBatch:
    """``batch`` with advantages of the whole step; a scalar per completion is spread over its tokens.

    Rows of one prompt share ``batch.group`` whatever their arm. An estimator that lists ``arm`` among its
    inputs is given all rows and tells the arms apart itself; any other sees one arm at a time, so that no
    statistic of it, be it over the group or over the step, mixes samples of different distributions.
    """
    if "arm" in estimator.spec.inputs or bool((batch.arm == batch.arm[0]).all()):
        return batch.replace(advantages=_estimated(batch, estimator))
    advantages = torch.zeros_like(batch.advantages)
    for arm in batch.arm.unique():
        rows = torch.nonzero(batch.arm == arm).flatten()
        advantages[rows] = _estimated(batch.rows(rows), estimator)
    return batch.replace(advantages=advantages)


def _estimated(batch: TrainBatch, estimator: BoundMethod) -> Tensor:
    """(B, T) advantages of rows that the estimator sees together."""
    inputs = {name: getattr(batch, name) for name in estimator.spec.inputs}
    advantages = estimator(batch.rewards, batch.group, **inputs)
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(batch.mask.shape)
    return advantages.detach().to(batch.advantages.dtype).contiguous()
