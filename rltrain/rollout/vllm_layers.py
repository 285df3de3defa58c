"""What stands inside vLLM's model: fused, padded and, on CPU, packed layers, seen as Hugging Face weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.tensor_ops import fingerprint_input, product_fingerprint, weight_fingerprint

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_READ_ENTRIES = 1 << 22  # of a packed weight at a time: 16 MiB in float32, and 32 more while they are summed


def repack_heads(model: nn.Module) -> None:
    """Pack every output head again. On CPU a head tied to the embedding is not repacked by ``reload_weights`` and stays stale."""
    heads: list[Any] = list(model.modules())
    for module in heads:
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


@torch.inference_mode()
def layer_fingerprints(model: nn.Module, known: Collection[str], names: Collection[str] | None = None) -> dict[str, float]:
    """One number per Hugging Face weight name, of what each layer multiplies with; ``names``: of these only.

    known: every name Hugging Face has for a weight of this model, by which a layer is told that is fused there too (Phi-3).
    """
    prints: dict[str, float] = {}
    for path, module in model.named_modules():
        prints.update(_of_module(_hugging_face_layers(path, known), module, names))
    return prints


def _hugging_face_layers(path: str, known: Collection[str]) -> list[str]:
    parent, _, leaf = path.rpartition(".")
    return [f"{parent}.{part}" for part in _FUSED[leaf]] if leaf in _FUSED and f"{path}.weight" not in known else [path]


def _of_module(layers: list[str], module: Any, names: Collection[str] | None) -> Iterator[tuple[str, float]]:
    own = dict(module.named_parameters(recurse=False))
    for kind in ("weight", "bias"):
        called = [f"{layer}.{kind}" for layer in layers]
        if own.get(kind) is None or not (names is None or any(name in names for name in called)):
            continue
        if kind == "weight" and hasattr(module, "cpu_linear") and (own[kind].numel() == 0 or type(module).__name__ == "ParallelLMHead"):
            found = _of_packed(called, module)
        else:
            parts = zip(called, _rows(own[kind], module, len(called)), strict=True)
            found = ((name, weight_fingerprint(name, part)) for name, part in parts)
        yield from ((name, number) for name, number in found if names is None or name in names)


def _of_packed(called: list[str], module: Any) -> Iterator[tuple[str, float]]:
    """Packed weights cannot be read, so the layer is run on unit vectors, as many as it has columns: one weight times 1 plus zeros
    is exact in every floating-point type. One product with all columns would be cheap, but it is rounded: its fingerprint is off
    by 1e-7 in float32 and by 1e-4 in bfloat16, where a step of 1e-6 moves it by about 5e-6."""
    columns = module.input_size
    signs = [fingerprint_input(name, columns, torch.device("cpu")) for name in called]
    products = [torch.zeros((), dtype=torch.float64)] * len(called)
    block = max(1, _READ_ENTRIES // module.output_size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        units = torch.zeros(stop - start, columns, dtype=module.params_dtype)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        read = module.quant_method.apply(module, units).t()  # (out, stop - start): these columns of the weight
        for index, part in enumerate(_rows(read, module, len(called))):
            products[index] = products[index] + part.double() @ signs[index][start:stop]
    yield from ((name, product_fingerprint(name, product)) for name, product in zip(called, products, strict=True))


def _rows(stacked: Tensor, module: Any, parts: int) -> list[Tensor]:
    """The output rows of each fused part, without the padding of a vocabulary."""
    if hasattr(module, "org_vocab_size"):
        return [stacked[: module.org_vocab_size]]
    return list(stacked.split(module.output_sizes)) if parts > 1 else [stacked]
