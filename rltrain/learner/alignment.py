"""How well the hidden states of a text point in one direction: GAIN-RL's signal for what a model can learn
from it, arXiv:2506.02281.

The states are those that enter the MLP of the last decoder layer. For a linear layer the squared gradient
norm is ``sum_ij (g_i . g_j)(x_i . x_j)``: inputs that agree give larger gradients. Means of cosines over
pairs of tokens come from sums of unit vectors, so no (tokens, tokens) matrix is formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rltrain.learner.packing import MicroBatch

__all__ = ["alignment", "is_alignment", "last_mlp_inputs", "pair_cosines"]


def is_alignment(name: str) -> bool:
    """Whether ``name`` asks for ``alignment``: the word alone, or with the length of the template's
    prefix and suffix and a weight.
    """
    return name.partition(":")[0] == "alignment"


@contextmanager
def last_mlp_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, the list gains the input of the last layer's MLP at every forward.

    Raises ValueError where there is no such module.
    """
    layers: Any = getattr(model.base_model, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) else None
    if not isinstance(mlp, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no layers[-1].mlp, whose input GAIN-RL reads; set data.order to "
            "shuffled"
        )
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def alignment(name: str, states: Tensor, micro: MicroBatch) -> Tensor:
    """(r,) float32 of the rows of ``micro``; states: (r, S, d), or (1, S, d) packed.

    "alignment": mean cosine over all pairs i <= j + 1 of tokens read, the diagonal included (the released
    training signal). "alignment:P:Q:w": C_intra + w C_inter of a prompt whose first P and last Q tokens are
    the template's.
    """
    _, *arguments = name.split(":")
    flat, rows = states.flatten(0, 1), range(micro.rows.shape[0])
    units = [
        nn.functional.normalize(flat[start:stop].float(), dim=-1)
        for start, stop in (_span(micro, row) for row in rows)
    ]
    if not arguments:
        values = [_released_mean(unit) for unit in units]
    else:
        prefix, suffix, weight = int(arguments[0]), int(arguments[1]), float(arguments[2])
        pairs = [pair_cosines(unit, prefix, suffix) for unit in units]
        values = [intra + weight * inter for intra, inter in pairs]
    return torch.stack(values) if values else flat.new_zeros(0, dtype=torch.float32)


def pair_cosines(unit: Tensor, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    """(C_intra, C_inter) of one text: unit vectors (n, d), of which ``prefix`` and ``suffix`` tokens at the
    ends are the template's.

    C_intra: mean cosine over pairs of different tokens of the text between them; C_inter: between those and
    the prefix. 0 where there is no pair. arXiv:2506.02281; the released code slices rows where it means
    columns, and fixes the lengths at 110 and 6.
    """
    question, head = unit[prefix : unit.shape[0] - suffix], unit[:prefix]
    count, total = question.shape[0], question.sum(0)
    pairs = max(count * (count - 1), 1)
    intra = (total.dot(total) - question.square().sum()) / pairs
    inter = total.dot(head.sum(0)) / max(count * prefix, 1)
    return intra, inter


def _released_mean(unit: Tensor) -> Tensor:
    """Mean cosine over the lower triangle, the diagonal and the first line above it, of unit vectors
    (n, d).
    """
    count, total = unit.shape[0], unit.sum(0)
    own = unit.square().sum()
    above = (unit[1:] * unit[:-1]).sum()
    return ((total.dot(total) + own) / 2 + above) / (count * (count + 1) / 2 + count - 1)


def _span(micro: MicroBatch, row: int) -> tuple[int, int]:
    """Where the tokens of a row stand among the flattened states: its last one predicts the last
    completion token.
    """
    mine = micro.index[micro.row == row]
    if len(mine) == 0:
        return 0, 0
    last = int(mine.max())
    return last - int(micro.position_ids.flatten()[last]), last + 1
