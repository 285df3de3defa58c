"""What a LoRA adapter and the weights under it take: parameters and bytes, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rltrain.config.capacity.constants import INT8_BYTES, MASTER_BYTES, NF4_BYTES
from rltrain.config.capacity.shape import ModelShape
from rltrain.config.schema import Adapter

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "query_key_value", "dense")


@dataclass(frozen=True)
class AdapterSize:
    """Counts over all layers of a model."""

    parameters: int  # of A and B
    inputs: int  # numbers per token that the adapted layers of one layer read
    linear: int  # parameters of the base's linear layers, the output head apart
    largest: int  # parameters of the largest of them
    quantize: str  # storage of the linear layers

    def base_bytes(self, shape: ModelShape, compute_bytes: int, *, throughout: bool) -> int:
        """What the base keeps. throughout: the embedding and the norms are in the products' precision too."""
        rest = shape.parameters - self.linear
        rounded = 0 if shape.tied else shape.embedding  # the head; a tied one is read as the embedding
        if throughout:
            rest_bytes = compute_bytes * rest
        else:
            rest_bytes = compute_bytes * rounded + MASTER_BYTES * (rest - rounded)
        return math.ceil(self.linear_bytes(compute_bytes) * self.linear) + rest_bytes

    def linear_bytes(self, compute_bytes: int) -> float:
        """Per parameter of the linear layers."""
        return {"nf4": NF4_BYTES, "int8": INT8_BYTES}.get(self.quantize, float(compute_bytes))

    def dequantized_bytes(self, compute_bytes: int) -> int:
        """One matrix at a time, for its product."""
        return 0 if self.quantize == "none" else compute_bytes * self.largest


def adapter_size(settings: Adapter, shape: ModelShape) -> AdapterSize:
    """kappatune's choice depends on the weights: counted are the matrices that take most."""
    matrices = linear_layers(shape)
    linear = sum(rows * columns for rows, columns in matrices.values())
    largest = max(rows * columns for rows, columns in matrices.values())
    match settings.targets:
        case "linear" | "kappatune":
            chosen = list(matrices.values())
        case "attention":
            chosen = [size for name, size in matrices.items() if name in _ATTENTION]
        case names:
            lasts = {name.rpartition(".")[2] for name in names}
            chosen = [size for name, size in matrices.items() if name in lasts]
    counts = [shape.layers * settings.rank * (rows + columns) for rows, columns in chosen]
    parameters = sum(counts)
    if settings.targets == "kappatune":
        every = sorted((count // shape.layers for count in counts for _ in range(shape.layers)), reverse=True)
        parameters = sum(every[: max(1, math.floor(len(every) * settings.kappa_share))])
    inputs = sum(columns for columns, _ in chosen)
    return AdapterSize(parameters, inputs, shape.layers * linear, largest, settings.quantize)


def linear_layers(shape: ModelShape) -> Mapping[str, tuple[int, int]]:
    """(input, output) numbers of the linear layers of one layer."""
    hidden = shape.hidden
    inner = shape.inner
    query = shape.query_width
    kv = shape.kv_width
    if shape.kind == "gpt_neox":
        return {
            "query_key_value": (hidden, 3 * hidden),
            "dense": (hidden, hidden),
            "dense_h_to_4h": (hidden, inner),
            "dense_4h_to_h": (inner, hidden),
        }
    return {
        "q_proj": (hidden, query),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
