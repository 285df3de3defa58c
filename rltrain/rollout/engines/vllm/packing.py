"""Additions to vLLM's reload: packs the layers for CPU kernels that vLLM does not repack, reads packed layers
back, and repairs the layers after an error.
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
    """Packs every output head again, because ``reload_weights`` does not repack a head that is tied to the
    embedding.
    """
    heads: list[Any] = list(model.modules())
    for module in heads:
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def abandon_reload(model: nn.Module, model_config: Any) -> None:
    """Gives every layer memory again after a reload that an error ended, so that weights can be loaded. Until
    then the values are those of no version.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def pack_experts_on_reload(model: nn.Module) -> None:
    """Makes each load pack the experts of every mixture. vLLM 0.32 packs them at the first load only, and
    would use the entries of later loads in the wrong places.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "experts_cls") and _instruction_set(module) is not None:
            method.process_weights_after_loading = _load_and_pack(method)


def _load_and_pack(method: Any) -> Any:
    load = method.process_weights_after_loading

    def process_weights_after_loading(layer: nn.Module) -> None:
        load(layer)
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)

    return process_weights_after_loading


def packed_columns(module: Any, entries: int) -> Iterator[tuple[int, Tensor]]:
    """(first column, (out, n) columns) of a packed linear layer, about ``entries`` numbers at a time.

    Packed weights cannot be read, so the layer is run on unit vectors: a weight times 1 plus zeros is exact
    in every floating-point type. A single product with all columns would be cheap, but is rounded: its
    fingerprint is off by 1e-7 in float32 and by 1e-4 in bfloat16, where a step of 1e-6 moves it by about
    5e-6.
    """
    columns = getattr(module, "input_size_per_partition", module.input_size)
    block = max(1, entries // getattr(module, "output_size_per_partition", module.output_size))
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        units = torch.zeros(stop - start, columns, dtype=module.params_dtype)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        yield start, module.quant_method.apply(module, units).t()


def expert_matrix(module: Any, weights: Tensor, expert: int) -> Tensor:
    """An expert of ``weights (experts, ...)``, a parameter of a mixture's layer, with its entries in the
    order in which they were loaded.
    """
    packed = weights[expert]
    instructions = _instruction_set(module)
    if instructions is None or weights.ndim < 3:
        return packed
    places = _packing_order(weights.shape[1], weights.shape[2], weights.dtype, instructions)
    return torch.empty_like(packed).flatten().index_copy_(0, places, packed.flatten()).view_as(packed)


def _instruction_set(module: Any) -> str | None:
    """The CPU's instruction set for which the experts are packed; None where they are not packed."""
    experts = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
    return None if getattr(experts, "_use_zentorch", False) else getattr(experts, "isa", None)


@lru_cache(maxsize=8)
def _packing_order(rows: int, columns: int, dtype: torch.dtype, instructions: str) -> Tensor:
    """(rows x columns,) the position in the plain matrix of each entry of the packed one, found by packing
    the numbers of the positions.
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
