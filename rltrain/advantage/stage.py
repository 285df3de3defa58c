"""The advantage stage: a registered estimator applied to a step's batch."""

from __future__ import annotations

from rltrain.registry import BoundMethod
from rltrain.types import TrainBatch


def assign(batch: TrainBatch, estimator: BoundMethod) -> TrainBatch:
    """``batch`` with advantages of the whole step; a scalar per completion is spread over its tokens."""
    inputs = {name: getattr(batch, name) for name in estimator.spec.inputs}
    advantages = estimator(batch.rewards, batch.group, **inputs)
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(batch.mask.shape)
    return batch.replace(advantages=advantages.detach().to(batch.advantages.dtype).contiguous())
