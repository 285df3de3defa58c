"""LoRA adapters of vLLM's model: where vLLM keeps A and B of each layer, and what it computes with.

vLLM stacks the adapters of fused layers, pads A and B to its largest rank, and multiplies B by the scale when
it loads an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rltrain.model_files import ADAPTER_SLOTS, padded_rank
from rltrain.rollout.engines.vllm.layers import Place
from rltrain.tensor_ops import Fingerprint, weight_fingerprint

__all__ = ["adapter_fingerprints", "adapter_options"]

_PREFIX = "base_model.model."


def adapter_options(rank: int, revision: str | None) -> dict[str, Any]:
    """vLLM's options for an engine that samples with adapters of this rank, and reads the base's weights from
    the model's files. revision: of the base.
    """
    return {
        "load_format": "auto",
        "revision": revision,
        "enable_lora": True,
        "max_lora_rank": padded_rank(rank),
        "max_loras": ADAPTER_SLOTS,
        "max_cpu_loras": ADAPTER_SLOTS,
    }


@torch.inference_mode()
def adapter_fingerprints(
    worker: Any, identity: int, rank: int, places: Mapping[str, Place]
) -> dict[str, Fingerprint]:
    """Fingerprints of A, and of B times the scale, by peft's names, of every layer that can have an adapter.

    identity: vLLM's number of the adapter. A layer whose A and B are 0 has none and is left out. Padding that
    is not 0 makes the numbers NaN. Raises RuntimeError where the adapter is not in use.
    """
    manager = worker.model_runner.lora_manager._adapter_manager
    if identity not in manager.lora_index_to_id:
        raise RuntimeError(f"vLLM does not hold adapter {identity}; it holds {manager.lora_index_to_id}")
    slot = manager.lora_index_to_id.index(identity)
    fingerprints: dict[str, Fingerprint] = {}
    for name, place in places.items():
        layer = manager.modules.get(place.module)
        if layer is None or not name.endswith(".weight") or not hasattr(layer, "lora_a_stacked"):
            continue
        down: Tensor = layer.lora_a_stacked[place.part][slot, 0]
        up: Tensor = layer.lora_b_stacked[place.part][slot, 0]
        if not (bool(down.any()) or bool(up.any())):
            continue
        is_clean = not (bool(down[rank:].any()) or bool(up[:, rank:].any()))
        path = name.removesuffix(".weight")
        for key, weight in ((f"{path}.lora_A.weight", down[:rank]), (f"{path}.lora_B.weight", up[:, :rank])):
            full_name = _PREFIX + key
            unequal = Fingerprint(math.nan, math.nan)
            fingerprints[full_name] = weight_fingerprint(full_name, weight) if is_clean else unequal
    return fingerprints
