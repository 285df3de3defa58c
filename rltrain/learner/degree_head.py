"""SPO's degree head: logits of how many of a completion's key phrases were taken out, from the hidden state
that predicts its last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rltrain.learner.packing import MicroBatch

__all__ = [
    "DEGREE_HEAD",
    "DegradedRows",
    "degree_logits",
    "is_degree_logit",
    "logit_names",
    "new_degree_head",
]

DEGREE_HEAD = "degree_head"  # the head's name in the module around the model
_LOGIT = "degree_logit:"


@dataclass(frozen=True)
class DegradedRows:
    """A degraded version of each chosen completion of an update."""

    completions: tuple[tuple[int, ...], ...]
    degree: Tensor  # (N,) int64, 0 for an intact one


def logit_names(levels: int) -> tuple[str, ...]:
    """The statistics that are the head's outputs, one for each degree."""
    return tuple(f"{_LOGIT}{degree}" for degree in range(levels))


def is_degree_logit(name: str) -> bool:
    return name.startswith(_LOGIT)


def new_degree_head(hidden: int, levels: int) -> nn.Linear:
    """A head that finds every degree equally likely: its loss starts at ln(levels)."""
    head = nn.Linear(hidden, levels)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def degree_logits(states: Tensor, head: nn.Linear) -> Tensor:
    """(R, levels) float32 from states (R, H)."""
    with torch.autocast(states.device.type, enabled=False):
        return linear(states.float(), head.weight.float(), head.bias.float())


def last_positions(micro_batch: MicroBatch) -> Tensor:
    """(R,) the place of each row's last token among all tokens of a micro-batch without shared prompts."""
    return torch.bincount(micro_batch.row, minlength=micro_batch.rows.shape[0]).cumsum(0) - 1


def place_at_last_tokens(logits: Tensor, last: Tensor, tokens: int) -> Mapping[str, Tensor]:
    """(n,) for each degree: the row's logit at its last token, 0 at the others."""
    zeros = logits.new_zeros(tokens)
    return {
        name: zeros.index_put((last,), logits[:, degree])
        for degree, name in enumerate(logit_names(logits.shape[1]))
    }
