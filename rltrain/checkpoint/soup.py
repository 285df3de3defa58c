"""SALSA: the weighted mean of several models, which serves as the reference model of RLHF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["soup"]


def soup(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """``sum_i weights[i] models[i]`` parameter by parameter, in float32 and back in the first model's dtype,
    arXiv:2411.01798.

    models: of one architecture, tokenizer and pretrained ancestor, fine-tuned with different seeds or data
    orders; the mean of other models is noise. Merge LoRA adapters first: the product of the means of B and A
    is not the mean of the products B A. Tensors that are not floating point must be equal and are kept.
    Raises ValueError on weights that do not sum to 1, and on names or shapes that differ.
    """
    if not models or len(models) != len(weights):
        raise ValueError(f"{len(models)} models and {len(weights)} weights; give one weight per model")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"soup weights {list(weights)} sum to {sum(weights):.6g}, expected 1")
    first = models[0]
    for number, other in enumerate(models[1:], 2):
        if other.keys() != first.keys():
            raise ValueError(
                f"model {number} has other weights than model 1: "
                f"{', '.join(sorted(other.keys() ^ first.keys())[:5])}"
            )
    return {name: _average_tensors(name, [model[name] for model in models], weights) for name in first}


def _average_tensors(name: str, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = parts[0]
    if any(part.shape != first.shape for part in parts):
        raise ValueError(
            f"weight {name} has shapes {', '.join(str(tuple(part.shape)) for part in parts)} in the models "
            "of the soup"
        )
    if not first.is_floating_point():
        if any(not torch.equal(part, first) for part in parts):
            raise ValueError(
                f"weight {name} is not floating point and differs between the models of the soup"
            )
        return first.clone()
    total = torch.zeros(
        first.shape, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device
    )
    for part, weight in zip(parts, weights, strict=True):
        if weight != 0:
            total += weight * part.to(total)
    return total.to(first.dtype)
