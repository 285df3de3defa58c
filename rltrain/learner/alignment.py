"""How well the hidden states of a text agree in direction: GAIN-RL's measure of how much a model can learn
from the text, arXiv:2506.02281.

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
    """Whether a statistic's ``name`` asks for ``alignment``, with or without arguments."""
    return name.partition(":")[0] == "alignment"


@contextmanager
def last_mlp_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, every forward pass appends the input of the last layer's MLP to the list.

    Raises ValueError where the model has no such module.
    """
    layers: Any = getattr(model.base_model, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) else None
    if not isinstance(mlp, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no layers[-1].mlp, whose input GAIN-RL reads; set data.order to "
            "shuffled"
        )
    inputs: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    try:
        yield inputs
    finally:
        handle.remove()


def alignment(name: str, states: Tensor, micro_batch: MicroBatch) -> Tensor:
    """(r,) float32, the alignment of each row of ``micro_batch``; states: (r, S, d), or (1, S, d) packed.

    name: "alignment" is the mean cosine over all pairs i <= j + 1 of the tokens read, the diagonal included
    (the released training signal). "alignment:P:Q:w" is C_intra + w C_inter of a prompt whose first P and
    last Q tokens are the template's.
    """
    _, *arguments = name.split(":")
    flat = states.flatten(0, 1)
    spans = [_span(micro_batch, row) for row in range(micro_batch.rows.shape[0])]
    units = [nn.functional.normalize(flat[start:stop].float(), dim=-1) for start, stop in spans]
    if not arguments:
        values = [_released_mean(unit) for unit in units]
    else:
        prefix = int(arguments[0])
        suffix = int(arguments[1])
        weight = float(arguments[2])
        pairs = [pair_cosines(unit, prefix, suffix) for unit in units]
        values = [intra + weight * inter for intra, inter in pairs]
    return torch.stack(values) if values else flat.new_zeros(0, dtype=torch.float32)


def pair_cosines(unit: Tensor, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    """(C_intra, C_inter) of one text, given as unit vectors (n, d).

    The first ``prefix`` and the last ``suffix`` tokens are the template's. C_intra: mean cosine over pairs of
    different tokens between them; C_inter: over pairs of such a token and one of the prefix. 0 where there is
    no pair. arXiv:2506.02281; the released code slices rows where it means columns, and fixes the lengths at
    110 and 6.
    """
    question = unit[prefix : unit.shape[0] - suffix]
    head = unit[:prefix]
    count = question.shape[0]
    total = question.sum(0)
    pairs = max(count * (count - 1), 1)
    intra = (total.dot(total) - question.square().sum()) / pairs
    inter = total.dot(head.sum(0)) / max(count * prefix, 1)
    return intra, inter


def _released_mean(unit: Tensor) -> Tensor:
    """Mean cosine over the lower triangle, the diagonal and the first line above it, of unit vectors
    (n, d).
    """
    count = unit.shape[0]
    total = unit.sum(0)
    diagonal = unit.square().sum()
    above = (unit[1:] * unit[:-1]).sum()
    return ((total.dot(total) + diagonal) / 2 + above) / (count * (count + 1) / 2 + count - 1)


def _span(micro_batch: MicroBatch, row: int) -> tuple[int, int]:
    """(start, stop) of a row's tokens among the flattened states; the last one predicts the last completion
    token.
    """
    places = micro_batch.index[micro_batch.row == row]
    if len(places) == 0:
        return 0, 0
    last = int(places.max())
    return last - int(micro_batch.position_ids.flatten()[last]), last + 1
