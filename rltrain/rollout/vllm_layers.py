"""What stands inside vLLM's model: fused, padded and, on CPU, packed layers, seen as Hugging Face weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.tensor_ops import fingerprint_input, product_fingerprint, weight_fingerprint

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def repack_heads(model: nn.Module) -> None:
    """Pack every output head again. On CPU a head tied to the embedding is not repacked by ``reload_weights`` and stays stale."""
    heads: list[Any] = list(model.modules())
    for module in heads:
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


@torch.inference_mode()
def layer_fingerprints(model: nn.Module, names: Collection[str] | None = None) -> dict[str, float]:
    """One number per Hugging Face weight name, of what each layer multiplies with; ``names``: of these only."""
    prints: dict[str, float] = {}
    for path, module in model.named_modules():
        layers = _hugging_face_layers(path)
        if names is None or any(f"{layer}.{kind}" in names for layer in layers for kind in ("weight", "bias")):
            prints.update((name, number) for name, number in _of_module(layers, module) if names is None or name in names)
    return prints


def _hugging_face_layers(path: str) -> list[str]:
    parent, _, leaf = path.rpartition(".")
    return [f"{parent}.{part}" for part in _FUSED[leaf]] if leaf in _FUSED else [path]


def _of_module(names: list[str], module: Any) -> Iterator[tuple[str, float]]:
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return
    if hasattr(module, "cpu_linear") and (own["weight"].numel() == 0 or type(module).__name__ == "ParallelLMHead"):
        yield from _packed_weight(names, module)
    elif "weight" in own:
        for name, part in zip(names, _rows(own["weight"], module, len(names)), strict=True):
            yield f"{name}.weight", weight_fingerprint(f"{name}.weight", part)
    if own.get("bias") is not None:
        for name, part in zip(names, _rows(own["bias"], module, len(names)), strict=True):
            yield f"{name}.bias", weight_fingerprint(f"{name}.bias", part)


def _packed_weight(names: list[str], module: Any) -> Iterator[tuple[str, float]]:
    """Packed layers cannot be read, so each is run on the random signs of its fingerprint: row i of the input belongs to name i."""
    columns = module.embedding_dim if hasattr(module, "embedding_dim") else module.input_size
    signs = [fingerprint_input(f"{name}.weight", columns, torch.device("cpu")) for name in names]
    dtype = module.params_dtype if hasattr(module, "params_dtype") else module.weight.dtype
    product = module.quant_method.apply(module, torch.stack(signs).to(dtype))
    for index, name in enumerate(names):
        yield f"{name}.weight", product_fingerprint(f"{name}.weight", _rows(product[index], module, len(names))[index])


def _rows(stacked: Tensor, module: Any, parts: int) -> list[Tensor]:
    """The output rows of each fused part, without the padding of a vocabulary."""
    if hasattr(module, "org_vocab_size"):
        return [stacked[: module.org_vocab_size]]
    return list(stacked.split(module.output_sizes)) if parts > 1 else [stacked]
