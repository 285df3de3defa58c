"""The advantage stage: a registered estimator applied to a step's batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.registry import BoundMethod
from rltrain.types.policy import TrainBatch


def compute_advantages(batch: TrainBatch, estimator: BoundMethod) -> TrainBatch:
    """``batch`` with the advantages of the whole step; a scalar per completion is copied to all its tokens.

    Rows of one prompt share ``batch.group`` whatever their source. An estimator with the input ``source``
    gets all rows and separates the sources itself. Any other estimator gets one source at a time, so that
    none of its statistics, over the group or over the step, mixes samples of different distributions.
    """
    if "source" in estimator.spec.inputs or bool((batch.source == batch.source[0]).all()):
        return batch.replace(advantages=_estimate_advantages(batch, estimator))
    advantages = torch.zeros_like(batch.advantages)
    for source in batch.source.unique():
        rows = torch.nonzero(batch.source == source).flatten()
        advantages[rows] = _estimate_advantages(batch.rows(rows), estimator)
    return batch.replace(advantages=advantages)


def _estimate_advantages(batch: TrainBatch, estimator: BoundMethod) -> Tensor:
    """(B, T) advantages of rows that the estimator gets together."""
    inputs = {name: getattr(batch, name) for name in estimator.spec.inputs}
    advantages = estimator(batch.rewards, batch.group, **inputs)
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(batch.mask.shape)
    return advantages.detach().to(batch.advantages.dtype).contiguous()
