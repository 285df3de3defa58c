"""SALSA: a model made of the weighted mean of others, to serve as the reference of RLHF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["soup"]


def soup(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """``sum_i weights[i] models[i]`` parameter by parameter, in float32 and back in the first model's dtype,
    arXiv:2411.01798.

    Models of one architecture, tokenizer and pretrained ancestor, fine-tuned with different seeds or data
    orders; anything else averages to noise. Merge LoRA adapters first: the mean of A and B is not the mean of
    B A. Tensors that are not floating point must agree and are kept. Raises ValueError on weights that do not
    sum to 1, and on names or shapes that differ.
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
    return {name: _mixed(name, [model[name] for model in models], weights) for name in first}


def _mixed(name: str, parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
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
