"""Which rows a step learns from at all."""

from __future__ import annotations

from rltrain.registry import method
from rltrain.tensor_ops import masked
from rltrain.types.policy import TrainBatch

__all__ = ["positive_only"]


@method("positive_only", arxiv="2310.16763")
def positive_only(batch: TrainBatch) -> TrainBatch:
    """Only rows with an advantage above 0 stay in the step, for loss and terms alike: SuperHF's supervised
    step, arXiv:2310.16763.

    The others are masked out, so that the aggregate divides by what is learned from and the gradient pass
    skips them. Pair it with the advantage ``best_of_n``.
    """
    kept = masked(batch.advantages, batch.mask).amax(dim=1) > 0
    return batch.replace(mask=batch.mask & kept[:, None])
