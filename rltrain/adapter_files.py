"""One version of a LoRA adapter on its way to an engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rltrain.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rltrain.tensor_ops import Fingerprint, weight_fingerprint

__all__ = ["NamedAdapter", "expected_fingerprints", "write_adapter"]


@dataclass(frozen=True)
class NamedAdapter:
    """name: under which engines offer this version, and no other. config: the content of its
    adapter_config.json. weights: A and B by peft's names, unsharded.
    """

    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        """The factor of B A."""
        rank = self.config["r"]
        return self.config["lora_alpha"] / (math.sqrt(rank) if self.config["use_rslora"] else rank)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(weight.nbytes for weight in self.weights.values())


def write_adapter(folder: Path, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Writes an adapter in peft's form into the new ``folder``."""
    folder.mkdir()
    tensors = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in weights}
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(dict(config)), encoding="utf-8")


def expected_fingerprints(
    weights: Mapping[str, Tensor], scale: float, dtype: torch.dtype
) -> dict[str, Fingerprint]:
    """The fingerprints of A and ``scale`` B, by peft's names, that an engine of this type should have."""
    expected: dict[str, Fingerprint] = {}
    for name, weight in weights.items():
        rounded = weight.to(dtype)
        held = rounded * scale if name.endswith(".lora_B.weight") else rounded
        if bool(held.any()) or name.endswith(".lora_A.weight"):
            expected[name] = weight_fingerprint(name, held)
        else:
            expected[name] = Fingerprint(0.0, 0.0)
    return expected
