"""Selects the completions that are distilled from a teacher, arXiv:2506.02208."""

from __future__ import annotations

from typing import Literal

import torch

from rltrain.needs import LOSS_TERM, NEEDS_CORRECT, PER_UPDATE
from rltrain.registry import method
from rltrain.types.policy import TrainBatch

__all__ = ["kdrl_mask"]


@method("kdrl_mask", arxiv="2506.02208", traits={PER_UPDATE, NEEDS_CORRECT, LOSS_TERM("kdrl")})
def kdrl_mask(
    batch: TrainBatch,
    *,
    level: Literal["response", "group"] = "response",
    denominator: Literal["kept", "all"] = "kept",
) -> TrainBatch:
    """Marks the completions on which the term ``kdrl`` acts, in ``extra["kdrl"]``, arXiv:2506.02208.

    Formula: mark ``1[wrong] N / N_wrong``, N tokens of the optimizer batch

    level "response": the incorrect completions; "group": those of prompts with no correct completion.
    denominator "kept" is the paper's masked mean: a mark is the number of the optimizer batch's tokens
    divided by the number of marked tokens (all ranks), so that the aggregate ``token_mean`` divides the term
    by the marked tokens, and a token weighs more when few answers are wrong. "all": marks are 1. Raises
    ValueError if no reward function says what is correct.
    """
    if batch.correct is None or bool(batch.correct.isnan().all() & batch.mask.any()):
        raise ValueError(
            "kdrl_mask needs to know which completions are correct, and no reward function reports it"
        )
    wrong = ~(batch.correct > 0)
    if level == "group":
        wrong &= ~torch.isin(batch.group, batch.group[~wrong])
    kept = batch.mask & wrong[:, None]
    scale = int(batch.mask.sum()) / max(int(kept.sum()), 1) if denominator == "kept" else 1.0
    return batch.with_extra(kdrl=kept.to(batch.weights.dtype) * scale)
