"""Selects the rows that a step learns from."""

from __future__ import annotations

from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import TrainBatch

__all__ = ["positive_only"]


@method("positive_only", arxiv="2310.16763")
def positive_only(batch: TrainBatch) -> TrainBatch:
    """Keeps only rows with an advantage above 0, for loss and terms alike: SuperHF's supervised step,
    arXiv:2310.16763.

    Formula: kept: ``A > 0``

    The other rows are masked out, so that they leave the aggregate's denominator and the gradient pass skips
    them. Pair it with the advantage ``best_of_n``.
    """
    kept = apply_mask(batch.advantages, batch.mask).amax(dim=1) > 0
    return batch.replace(mask=batch.mask & kept[:, None])
