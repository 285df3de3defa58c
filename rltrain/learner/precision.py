"""In which precision a model multiplies, and in which the weights that it does not train are kept."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

__all__ = ["COMPUTE_DTYPES", "ROUNDING", "computes_throughout", "round_frozen", "stored_dtypes"]

# Nats per token, by precision: how much two passes over one row may differ.
ROUNDING = {"no": 1e-4, "bf16": 0.05, "fp16": 0.02}
# The dtype of matrix products, by precision.
COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def computes_throughout(accelerator: Any) -> bool:
    """Whether the backend's model computes in the low precision from its embedding on (FSDP2, ZeRO); the
    others cast at each product.
    """
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def stored_dtypes(frozen: nn.Module, dtype: torch.dtype, *, throughout: bool) -> dict[str, torch.dtype]:
    """The precision in which each parameter of ``frozen`` is kept, for passes in ``dtype``.

    throughout: the trained model computes in ``dtype`` from its embedding on (FSDP2, ZeRO). Otherwise it
    keeps float32 weights and autocast rounds those of linear layers at each use: here these are kept rounded,
    and the embedding and the norms stay as they are.
    """
    linear = {
        id(parameter)
        for module in frozen.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    read_as_stored = {
        id(parameter)
        for module in frozen.modules()
        if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    rounded = linear - read_as_stored  # a tied head is also the embedding
    return {
        name: dtype
        if parameter.is_floating_point() and (throughout or id(parameter) in rounded)
        else parameter.dtype
        for name, parameter in frozen.named_parameters()
    }


@torch.no_grad()
def round_frozen(model: nn.Module, dtype: torch.dtype, *, throughout: bool) -> None:
    """Keep the parameters of ``model`` that are not trained as ``stored_dtypes`` says, in place: nothing
    would read their float32 copies.
    """
    dtypes = stored_dtypes(model, dtype, throughout=throughout)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(dtypes[name])
