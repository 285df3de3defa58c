"""Reloading as vLLM does it: layers packed for CPU kernels where it forgets to, read back, and put
right after an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["abandon_reload", "expert_matrix", "pack_experts_on_reload", "packed_columns", "repack_heads"]

_DIGIT_BITS = 8  # whole numbers below 2**8 are exact in every floating-point type


def repack_heads(model: nn.Module) -> None:
    """Pack every output head again: a head tied to the embedding is not repacked by
    ``reload_weights`` and stays stale.
    """
    heads: list[Any] = list(model.modules())
    for module in heads:
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def abandon_reload(model: nn.Module, model_config: Any) -> None:
    """Give every layer memory again after a reload that an error ended: what it holds is nobody's
    weights, but it can be loaded.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def pack_experts_on_reload(model: nn.Module) -> None:
    """Have the experts of every mixture packed at each load. vLLM 0.32 packs them at the first one only:
    later ones would be multiplied as if they had been, every entry in another's place."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "experts_cls") and _instruction_set(module) is not None:
            method.process_weights_after_loading = _packing_too(method)


def _packing_too(method: Any) -> Any:
    load = method.process_weights_after_loading

    def process_weights_after_loading(layer: nn.Module) -> None:
        load(layer)
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)

    return process_weights_after_loading


def packed_columns(module: Any, entries: int) -> Iterator[tuple[int, Tensor]]:
    """(first column, (out, some) columns) of a packed linear layer, about ``entries`` numbers at a time.

    Packed weights cannot be read, so the layer is run on unit vectors: one weight times 1 plus zeros is exact
    in every floating-point type. One product with all columns would be cheap, but it is rounded: its
    fingerprint is off by 1e-7 in float32 and by 1e-4 in bfloat16, where a step of 1e-6 moves it by about
    5e-6.
    """
    columns = module.input_size
    block = max(1, entries // module.output_size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        units = torch.zeros(stop - start, columns, dtype=module.params_dtype)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        yield start, module.quant_method.apply(module, units).t()


def expert_matrix(module: Any, held: Tensor, expert: int) -> Tensor:
    """One expert of ``held (experts, ...)``, a parameter of a mixture's layer, its entries in the
    order they had when loaded.
    """
    instructions = _instruction_set(module)
    if instructions is None or held.ndim < 3:
        return held[expert]
    places = _packing(held.shape[1], held.shape[2], held.dtype, instructions)
    return (
        torch.empty_like(held[expert])
        .flatten()
        .index_copy_(0, places, held[expert].flatten())
        .view_as(held[expert])
    )


def _instruction_set(module: Any) -> str | None:
    """For which the CPU's experts are packed; None where they are not."""
    experts = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
    return None if getattr(experts, "_use_zentorch", False) else getattr(experts, "isa", None)


@lru_cache(maxsize=8)
def _packing(rows: int, columns: int, dtype: torch.dtype, instructions: str) -> Tensor:
    """(rows x columns,) for each entry of a packed matrix its position in the plain one, read off
    packed position numbers.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    count = rows * columns
    positions = torch.arange(count)
    places = torch.zeros_like(positions)
    for shift in range(0, count.bit_length(), _DIGIT_BITS):
        digit = (positions >> shift) % (1 << _DIGIT_BITS)
        packed = cpu_prepack_moe_weight(digit.to(dtype).view(1, rows, columns), instructions)
        places += packed.flatten().long() << shift
    if not torch.equal(places.sort().values, positions):
        raise RuntimeError(
            "vLLM's packing of experts is no reordering of their entries; this vLLM version is not supported"
        )
    return places
