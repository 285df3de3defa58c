"""What vLLM's model multiplies with, by checkpoint name: layers that it renames, fuses, pads and, on CPU,
packs.

``find_places`` says once where each weight of the checkpoint is kept; ``layer_fingerprints`` reads it there,
after every load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.rollout.engines.vllm.packing import expert_matrix, packed_columns
from rltrain.tensor_ops import Fingerprint, fingerprint_input, product_fingerprint, weight_fingerprint

__all__ = ["Architecture", "Place", "Places", "find_places", "layer_fingerprints"]

_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ORDER = {"q": 0, "k": 1, "v": 2}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)")
_EXPERT_PARTS = {"gate_proj": ("w13", 0), "w1": ("w13", 0), "up_proj": ("w13", 1), "w3": ("w13", 1)}
_EXPERT_PARTS |= {"down_proj": ("w2", 0), "w2": ("w2", 0)}
_ALL_EXPERTS = re.compile(
    r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?"
)  # one weight of all, as in GPT-OSS
_EVERY = -1
_DERIVED = ("W_UV", "W_UK_T")  # of latent attention, from kv_b_proj: compared with it where that is read
_READ_ENTRIES = 1 << 22  # of a packed weight at a time: 16 MiB in float32, and 32 more while they are summed


@dataclass(frozen=True)
class Architecture:
    """What transformers says of a model's checkpoint."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]  # by name
    parameters: frozenset[str]  # names of what is trained, tied weights once
    ties: Mapping[str, str]  # second name of a weight to its first
    transposed: frozenset[str]  # weights stored as (in, out)


@dataclass(frozen=True)
class Place:
    """Where vLLM keeps one weight of the checkpoint: a part of a parameter of a module."""

    module: str
    parameter: str
    part: int = 0  # of the ``parts`` that are stacked in it
    parts: int = 1
    expert: int | None = None  # _EVERY: of all of them


@dataclass(frozen=True)
class Places:
    """All of them, by checkpoint name, and what stands in the way of a proof: names of the checkpoint without
    a place, and parameters of vLLM that no name accounts for."""

    of: Mapping[str, Place]
    nowhere: tuple[str, ...]
    unaccounted: tuple[str, ...]


def find_places(model: nn.Module, architecture: Architecture) -> Places:
    """Reads names only: it can be asked before any weight is loaded."""
    finder = _Finder(model)
    found = {name: place for name in architecture.shapes if (place := finder.place_of(name)) is not None}
    for (
        second,
        first,
    ) in architecture.ties.items():  # a head that vLLM has not, for it multiplies with the embedding
        if second not in found and first in found:
            found[second] = found[first]
    nowhere = tuple(name for name in architecture.shapes if name not in found)
    return Places(found, nowhere, tuple(finder.unaccounted(found.values())))


class _Finder:
    def __init__(self, model: Any) -> None:
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._renamed = (lambda name: name) if mapper is None else mapper.get_rename_mapper().map_name
        self._stacked = (
            _STACKED | _stacked_by(mapper) | _stacked_in(getattr(model, "packed_modules_mapping", None))
        )
        self._parameters = {
            path: dict(module.named_parameters(recurse=False)) for path, module in model.named_modules()
        }

    def place_of(self, name: str) -> Place | None:
        renamed = self._renamed(name)
        if renamed is None:
            return None
        module, _, parameter = renamed.rpartition(".")
        if (match := _ALL_EXPERTS.fullmatch(name)) is not None:
            stem = "w13" if match[2] == "gate_up_proj" else "w2"
            return self._place_in_experts(module, stem, match[3] or "_weight", 0, _EVERY)
        if (match := _EXPERT.fullmatch(renamed)) is not None and match[3] in _EXPERT_PARTS:
            stem, part = _EXPERT_PARTS[match[3]]
            return self._place_in_experts(match[1], stem, f"_{match[4]}", part, int(match[2]))
        if (
            parameter != name.rpartition(".")[2]
        ):  # Mamba's A_log, of which vLLM keeps -exp: other numbers than the learner's
            return None
        if self._has(module, parameter):
            return Place(module, parameter)
        return self._place_in_stack(module, parameter)

    def _place_in_stack(self, module: str, parameter: str) -> Place | None:
        parent, _, leaf = module.rpartition(".")
        for stacked, parts in self._stacked.items():
            if leaf in parts and self._has(f"{parent}.{stacked}", parameter):
                return Place(f"{parent}.{stacked}", parameter, parts.index(leaf), len(parts))
        return None

    def _place_in_experts(self, module: str, stem: str, kind: str, part: int, expert: int) -> Place | None:
        parts = 2 if stem == "w13" and expert != _EVERY else 1
        for path in (f"{module}.routed_experts", module):
            if self._has(path, stem + kind):
                return Place(path, stem + kind, part, parts, expert)
        return None

    def unaccounted(self, places: Collection[Place]) -> Iterator[str]:
        """Parameters of which at least one part belongs to no weight of the checkpoint."""
        seen: dict[tuple[str, str], set[tuple[int, int | None]]] = {}
        parts: dict[tuple[str, str], int] = {}
        for place in places:
            key = place.module, place.parameter
            seen.setdefault(key, set()).add((place.part, place.expert))
            parts[key] = place.parts
        known = {id(self._parameters[module][parameter]) for module, parameter in seen}
        for module, parameters in self._parameters.items():
            for name, parameter in parameters.items():
                key = module, name
                second = key not in seen and id(parameter) in known  # the same tensor by another path
                experts = (
                    parameter.shape[0]
                    if any(expert not in (None, _EVERY) for _, expert in seen.get(key, ()))
                    else 1
                )
                complete = len(seen.get(key, ())) == parts.get(key, 1) * experts
                if not (complete or second or name in _DERIVED):
                    yield f"{module}.{name}"

    def _has(self, module: str, parameter: str) -> bool:
        return parameter in self._parameters.get(module, ())


def _stacked_by(mapper: Any) -> dict[str, tuple[str, ...]]:
    """Of a mapper's ``{".q_proj": (".qkv_proj", "q"), ...}``, the parts of each stacked layer in
    their order.
    """
    found: dict[str, dict[int, str]] = {}
    for part, (stacked, shard) in getattr(mapper, "orig_to_new_stacked", {}).items():
        order = _ORDER.get(shard) if isinstance(shard, str) else shard
        if isinstance(order, int):
            found.setdefault(stacked.rpartition(".")[2], {})[order] = part.rpartition(".")[2]
    return {stacked: tuple(parts[order] for order in sorted(parts)) for stacked, parts in found.items()}


def _stacked_in(mapping: Mapping[str, Collection[str]] | None) -> dict[str, tuple[str, ...]]:
    return {stacked: tuple(parts) for stacked, parts in (mapping or {}).items() if len(parts) > 1}


@torch.inference_mode()
def layer_fingerprints(
    model: nn.Module,
    places: Mapping[str, Place],
    architecture: Architecture,
    names: Collection[str] | None = None,
) -> dict[str, Fingerprint]:
    """One number per checkpoint name, of what each layer multiplies with. names: of these only; None:
    of all.
    """
    together: dict[tuple[str, str], list[str]] = {}
    for name, place in places.items():
        if names is None or name in names:
            together.setdefault((place.module, place.parameter), []).append(name)
    prints: dict[str, Fingerprint] = {}
    for (path, parameter), called in together.items():
        module = model.get_submodule(path)
        reader = _Reader(module, parameter, {name: places[name] for name in called}, architecture)
        prints.update(reader.fingerprints())
        if path.endswith(".kv_b_proj") and not _same_in_attention(model, path, module):
            prints.update(dict.fromkeys(called, Fingerprint(math.nan, math.nan)))  # equal to nothing
    return prints


@dataclass(frozen=True)
class _Reader:
    """Reads the weights ``places`` of one parameter of ``module``."""

    module: Any
    parameter: str
    places: Mapping[str, Place]
    architecture: Architecture

    def fingerprints(self) -> Iterator[tuple[str, Fingerprint]]:
        if self._packed():
            yield from self._of_packed()
            return
        held: Tensor = getattr(self.module, self.parameter)
        for name, place in self.places.items():
            yield name, weight_fingerprint(name, self._as_stored(name, self._part(held, name, place)))

    def _packed(self) -> bool:
        """Whether the layer multiplies with a copy that cannot be read, the weight being there or not.

        Embeddings look up theirs.
        """
        looked_up = type(self.module).__name__ == "VocabParallelEmbedding"
        return self.parameter == "weight" and hasattr(self.module, "cpu_linear") and not looked_up

    def _of_packed(self) -> Iterator[tuple[str, Fingerprint]]:
        """Column by column: a product with all of them at once would be rounded."""
        if any(name in self.architecture.transposed for name in self.places):
            (name,) = self.places
            yield name, weight_fingerprint(name, self._as_stored(name, _whole(self.module)))
            return
        columns = self.module.input_size
        signs = {name: fingerprint_input(name, columns, torch.device("cpu")) for name in self.places}
        products = dict.fromkeys(self.places, torch.zeros((), dtype=torch.float64))
        for start, read in packed_columns(self.module, _READ_ENTRIES):
            for name, place in self.places.items():
                part = self._part(read, name, place).double()
                products[name] = products[name] + part @ signs[name][start : start + read.shape[1]]
        yield from ((name, product_fingerprint(name, product)) for name, product in products.items())

    def _part(self, held: Tensor, name: str, place: Place) -> Tensor:
        """The entries of one weight, without padding."""
        if place.expert == _EVERY:
            return torch.stack([expert_matrix(self.module, held, expert) for expert in range(held.shape[0])])
        if place.expert is not None:
            matrix = expert_matrix(self.module, held, place.expert)
            rows = matrix.shape[0] // place.parts
            size = list(self.architecture.shapes[name])
            mine = matrix.narrow(0, place.part * rows, size[0])
            return mine if mine.ndim < 2 else mine[:, : size[1]]
        if hasattr(self.module, "org_vocab_size"):
            return held[: self.module.org_vocab_size]
        if place.module.endswith(".query_key_value") and hasattr(self.module, "num_kv_heads"):
            return _by_group(held, self.module)
        return held.split(self.module.output_sizes)[place.part] if place.parts > 1 else held

    def _as_stored(self, name: str, part: Tensor) -> Tensor:
        if (match := _ALL_EXPERTS.fullmatch(name)) is not None and part.ndim == 3:
            rows = self.architecture.shapes[f"{match[1]}.gate_up_proj"][1]
            return part if rows == self.module.w13_weight.shape[1] else part.transpose(1, 2)
        return part.t() if name in self.architecture.transposed else part


def _whole(packed: Any) -> Tensor:
    return torch.cat([read for _, read in packed_columns(packed, _READ_ENTRIES)], dim=1)


def _by_group(stacked: Tensor, module: Any) -> Tensor:
    """Rows of all queries, keys and values, in the order of BLOOM's and Falcon's checkpoints: per group of
    heads that share keys its queries, its key and its value."""
    groups, head = module.num_kv_heads, module.head_size
    queries, keys, values = stacked.split([module.num_heads * head, groups * head, groups * head])
    return torch.cat(
        [part.reshape(groups, -1, *part.shape[1:]) for part in (queries, keys, values)], dim=1
    ).flatten(0, 1)


def _same_in_attention(model: nn.Module, path: str, layer: Any) -> bool:
    """Latent attention decodes with two copies of the halves of ``kv_b_proj``: whether they are what
    the layer holds.
    """
    parent = path.rpartition(".")[0]
    for place, module in model.get_submodule(parent).named_modules():
        attention: Any = module
        if place and hasattr(attention, "W_UK_T"):
            heads, keys, rank = attention.W_UK_T.shape
            stored = (_whole(layer) if hasattr(layer, "cpu_linear") else layer.weight).reshape(
                heads, -1, rank
            )
            equal = torch.equal(stored[:, :keys], attention.W_UK_T)
            return equal and torch.equal(stored[:, keys:], attention.W_UV.transpose(1, 2))
    return True
