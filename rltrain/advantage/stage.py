"""The advantage stage: a registered estimator applied to a step's batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.registry import BoundMethod
from rltrain.types.policy import TrainBatch


def compute_advantages(batch: TrainBatch, estimator: BoundMethod) -> TrainBatch:
    """``batch`` with advantages of the whole step; a scalar per completion is spread over its tokens.

    Rows of one prompt share ``batch.group`` whatever their source. An estimator that lists ``source`` among its
    inputs is given all rows and tells the sources apart itself; any other sees one source at a time, so that no
    statistic of it, be it over the group or over the step, mixes samples of different distributions.
    """
    if "source" in estimator.spec.inputs or bool((batch.source == batch.source[0]).all()):
        return batch.replace(advantages=_estimated(batch, estimator))
    advantages = torch.zeros_like(batch.advantages)
    for source in batch.source.unique():
        rows = torch.nonzero(batch.source == source).flatten()
        advantages[rows] = _estimated(batch.rows(rows), estimator)
    return batch.replace(advantages=advantages)


def _estimated(batch: TrainBatch, estimator: BoundMethod) -> Tensor:
    """(B, T) advantages of rows that the estimator sees together."""
    inputs = {name: getattr(batch, name) for name in estimator.spec.inputs}
    advantages = estimator(batch.rewards, batch.group, **inputs)
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(batch.mask.shape)
    return advantages.detach().to(batch.advantages.dtype).contiguous()
