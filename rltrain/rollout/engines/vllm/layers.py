"""The weights that vLLM's model computes with, by checkpoint name: vLLM renames, fuses and pads layers and,
on CPU, packs them.

``find_places`` finds once where vLLM keeps each weight of the checkpoint; ``layer_fingerprints`` reads the
weights there after every load. Reading a packed layer takes a multiplication by every unit vector, so that
``record_packed_layers`` takes the products from the entries that a layer is packed from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.rollout.engines.vllm.packing import expert_matrix, packed_columns
from rltrain.rollout.engines.vllm.shares import (
    EVERY_EXPERT,
    Architecture,
    Place,
    Product,
    Share,
    find_share,
    local_expert,
    part_sizes,
    vocabulary_rows,
)
from rltrain.tensor_ops import Fingerprint, fingerprint_input, product_fingerprint, weight_product

__all__ = [
    "Architecture",
    "Place",
    "Places",
    "Reader",
    "find_places",
    "find_readers",
    "layer_fingerprints",
    "layer_products",
    "read_products",
    "record_packed_layers",
]

_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ORDER = {"q": 0, "k": 1, "v": 2}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)")
_EXPERT_PARTS = {"gate_proj": ("w13", 0), "w1": ("w13", 0), "up_proj": ("w13", 1), "w3": ("w13", 1)}
_EXPERT_PARTS |= {"down_proj": ("w2", 0), "w2": ("w2", 0)}
# a single weight of all experts, as in GPT-OSS
_ALL_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?")
_DERIVED = ("W_UV", "W_UK_T")  # of latent attention, copies of kv_b_proj: compared with it when it is read
# entries of a packed weight read at a time: 16 MiB in float32, and 32 more while they are summed
_READ_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Places:
    """The place of each weight, and what prevents a comparison: checkpoint names without a place, and
    parameters of vLLM that belong to no checkpoint name.
    """

    by_name: Mapping[str, Place]
    missing: tuple[str, ...]
    unexplained: tuple[str, ...]


def find_places(model: nn.Module, architecture: Architecture) -> Places:
    """Finds the place of every weight from names alone, so that no weight need be loaded."""
    finder = _Finder(model)
    places = {name: place for name in architecture.shapes if (place := finder.place_of(name)) is not None}
    # a tied head that vLLM does not have, because it multiplies with the embedding
    for second, first in architecture.ties.items():
        if second not in places and first in places:
            places[second] = places[first]
    missing = tuple(name for name in architecture.shapes if name not in places)
    return Places(places, missing, tuple(finder.unexplained_parameters(places.values())))


class _Finder:
    """Finds the places of checkpoint names in vLLM's ``model``."""

    def __init__(self, model: Any) -> None:
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._rename = (lambda name: name) if mapper is None else mapper.get_rename_mapper().map_name
        packed_modules = getattr(model, "packed_modules_mapping", None)
        self._stacked = _STACKED | _mapper_stacks(mapper) | _packed_stacks(packed_modules)
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        for path, module in model.named_modules():
            parameters = self._parameters.setdefault(path.removesuffix(".base_layer"), {})
            parameters |= dict(module.named_parameters(recurse=False))

    def place_of(self, name: str) -> Place | None:
        renamed = self._rename(name)
        if renamed is None:
            return None
        module, _, parameter = renamed.rpartition(".")
        if (match := _ALL_EXPERTS.fullmatch(name)) is not None:
            stem = "w13" if match[2] == "gate_up_proj" else "w2"
            return self._place_in_experts(module, stem, match[3] or "_weight", 0, EVERY_EXPERT)
        if (match := _EXPERT.fullmatch(renamed)) is not None and match[3] in _EXPERT_PARTS:
            stem, part = _EXPERT_PARTS[match[3]]
            return self._place_in_experts(match[1], stem, f"_{match[4]}", part, int(match[2]))
        # vLLM stores other numbers under another name, such as -exp of Mamba's A_log
        if parameter != name.rpartition(".")[2]:
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
        parts = 2 if stem == "w13" and expert != EVERY_EXPERT else 1
        for path in (f"{module}.routed_experts", module):
            if self._has(path, stem + kind):
                return Place(path, stem + kind, part, parts, expert)
        return None

    def unexplained_parameters(self, places: Collection[Place]) -> Iterator[str]:
        """Parameters with at least one part that belongs to no weight of the checkpoint."""
        known_parts: dict[tuple[str, str], set[tuple[int, int | None]]] = {}
        counts: dict[tuple[str, str], int] = {}
        for place in places:
            key = place.module, place.parameter
            known_parts.setdefault(key, set()).add((place.part, place.expert))
            counts[key] = place.parts
        known_tensors = {id(self._parameters[module][parameter]) for module, parameter in known_parts}

        for module, parameters in self._parameters.items():
            for name, parameter in parameters.items():
                key = module, name
                parts = known_parts.get(key, set())
                is_alias = key not in known_parts and id(parameter) in known_tensors
                has_experts = any(expert not in (None, EVERY_EXPERT) for _, expert in parts)
                experts = parameter.shape[0] if has_experts else 1
                is_complete = len(parts) == counts.get(key, 1) * experts
                if not (is_complete or is_alias or name in _DERIVED):
                    yield f"{module}.{name}"

    def _has(self, module: str, parameter: str) -> bool:
        return parameter in self._parameters.get(module, ())


def _mapper_stacks(mapper: Any) -> dict[str, tuple[str, ...]]:
    """The parts of each stacked layer in their order, from a mapper's ``{".q_proj": (".qkv_proj", "q")}``."""
    stacks: dict[str, dict[int, str]] = {}
    for part, (stacked, shard) in getattr(mapper, "orig_to_new_stacked", {}).items():
        order = _ORDER.get(shard) if isinstance(shard, str) else shard
        if isinstance(order, int):
            stacks.setdefault(stacked.rpartition(".")[2], {})[order] = part.rpartition(".")[2]
    return {stacked: tuple(parts[order] for order in sorted(parts)) for stacked, parts in stacks.items()}


def _packed_stacks(mapping: Mapping[str, Collection[str]] | None) -> dict[str, tuple[str, ...]]:
    return {stacked: tuple(parts) for stacked, parts in (mapping or {}).items() if len(parts) > 1}


def layer_fingerprints(
    model: nn.Module,
    places: Mapping[str, Place],
    architecture: Architecture,
    names: Collection[str] | None = None,
) -> dict[str, Fingerprint]:
    """The fingerprint of the weight that vLLM computes with, by checkpoint name. names: None for all.

    For a model that is whole in this process.
    """
    return {
        product.name: product_fingerprint(product.name, product.values)
        for product in layer_products(model, places, architecture, names)
    }


@torch.inference_mode()
def layer_products(
    model: nn.Module,
    places: Mapping[str, Place],
    architecture: Architecture,
    names: Collection[str] | None = None,
    reads_entries: Callable[[str], bool] = lambda path: True,
) -> Iterator[Product]:
    """``read_products`` of the weights with these names; None for all."""
    yield from read_products(model, find_readers(model, places, architecture, names), reads_entries)


@torch.inference_mode()
def read_products(
    model: nn.Module, readers: Sequence[tuple[str, Reader]], reads_entries: Callable[[str], bool]
) -> Iterator[Product]:
    """The product of each weight that this process computes with, not to be changed in place.

    reads_entries: whether the entries of the packed layer at this path are read, though there is a record of
    them.
    """
    for path, reader in readers:
        is_stale = path.endswith(".kv_b_proj") and not _attention_copies_match(model, path, reader.module)
        for product in reader.products(reads_entries(path)):
            yield replace(product, values=product.values * math.nan) if is_stale else product


def record_packed_layers(model: nn.Module, places: Mapping[str, Place], architecture: Architecture) -> None:
    """From the next load on, every packed layer keeps the products of the entries that it is packed from."""
    for _, reader in find_readers(model, places, architecture):
        if reader.is_packed() and not any(name in architecture.transposed for name in reader.places):
            method: Any = reader.module.quant_method
            method.process_weights_after_loading = _record_and_pack(method, reader)


def _record_and_pack(method: Any, reader: Reader) -> Callable[[nn.Module], None]:
    pack = method.process_weights_after_loading

    def process_weights_after_loading(layer: nn.Module) -> None:
        if layer is not reader.module:
            pack(layer)
            return
        with torch.no_grad():
            products = tuple(reader.plain_products())
        pack(layer)
        reader.module.rltrain_record = _Record(reader.module.cpu_linear, products)

    return process_weights_after_loading


@dataclass(frozen=True)
class _Record:
    """multiply: the packed layer's function whose products these are; of another it says nothing."""

    multiply: Any
    products: Sequence[Product]


def find_readers(
    model: nn.Module,
    places: Mapping[str, Place],
    architecture: Architecture,
    names: Collection[str] | None = None,
) -> list[tuple[str, Reader]]:
    """(path of a module, reader) of every parameter. names: None for all."""
    readers: list[tuple[str, Reader]] = []
    names_by_parameter: dict[tuple[str, str], list[str]] = {}
    for name, place in places.items():
        if names is None or name in names:
            names_by_parameter.setdefault((place.module, place.parameter), []).append(name)

    for (path, parameter), parameter_names in names_by_parameter.items():
        module: Any = model.get_submodule(path)
        module = getattr(module, "base_layer", module)  # of a layer that takes adapters
        named = {name: places[name] for name in parameter_names}
        readers.append((path, Reader(module, parameter, named, architecture)))
    return readers


@dataclass(frozen=True)
class Reader:
    """Reads the weights ``places`` of one parameter of ``module``."""

    module: Any
    parameter: str
    places: Mapping[str, Place]
    architecture: Architecture

    def products(self, reads_entries: bool) -> Iterator[Product]:
        if not self.is_packed():
            yield from self.plain_products()
        elif reads_entries or (recorded := self._recorded_products()) is None:
            yield from self._packed_products()
        else:
            yield from recorded

    def plain_products(self) -> Iterator[Product]:
        """Of the entries as they were loaded, where they are not packed, or not yet."""
        weight: Tensor = getattr(self.module, self.parameter)
        for name, place in self.places.items():
            share = self._share(name)
            if share is not None:
                yield self._product(share, self._as_stored(name, self._part(weight, name, place)))

    def _recorded_products(self) -> list[Product] | None:
        """Those that were recorded when the layer was packed, if it multiplies with what was packed then."""
        record: _Record | None = getattr(self.module, "rltrain_record", None)
        if record is None or record.multiply is not self.module.cpu_linear:
            return None
        products = [product for product in record.products if product.name in self.places]
        if not self._multiplies_like(products):
            return None
        return products

    def _multiplies_like(self, products: Sequence[Product]) -> bool:
        """Whether what the layer itself multiplies agrees with these, as far as its rounding allows."""
        outputs = self.module.quant_method.apply(self.module, self._inputs).t()
        width = self._inputs.shape[1]
        rounding = 2 * torch.finfo(outputs.dtype).eps + 2 * torch.finfo(torch.float32).eps * math.sqrt(width)
        for place, product in enumerate(products):
            output = self._part(outputs[:, place : place + 1], product.name, self.places[product.name])
            if not (output[:, 0] - product.values).norm() <= rounding * product.values.norm():
                return False
        return True

    @cached_property
    def _inputs(self) -> Tensor:
        """(weights, columns in this process) what fingerprints multiply each weight with."""
        width = self._width()
        inputs: list[Tensor] = []
        for name in self.places:
            share = self._share(name)
            assert share is not None, f"{name}: a linear layer is not divided by experts"
            signs = fingerprint_input(name, share.columns or width, torch.device("cpu"))
            inputs.append(signs[share.first_column : share.first_column + width])
        return torch.stack(inputs).to(self.module.params_dtype)

    def _width(self) -> int:
        """Columns of the weight in this process."""
        return int(getattr(self.module, "input_size_per_partition", self.module.input_size))

    def _share(self, name: str) -> Share | None:
        return find_share(self.module, self.parameter, name, self.places[name], self.architecture)

    def _product(self, share: Share, part: Tensor) -> Product:
        columns = share.columns
        values = weight_product(share.name, part, first_column=share.first_column, columns=columns)
        return Product(share.name, values, share)

    def is_packed(self) -> bool:
        """Whether the layer computes with a packed copy, which cannot be read, even if the weight exists too.

        Embeddings read the weight.
        """
        is_embedding = type(self.module).__name__ == "VocabParallelEmbedding"
        return self.parameter == "weight" and hasattr(self.module, "cpu_linear") and not is_embedding

    def _packed_products(self) -> Iterator[Product]:
        """Reads the weight by columns, because a product with all of them at once would be rounded."""
        shares = {name: share for name in self.places if (share := self._share(name)) is not None}
        if any(name in self.architecture.transposed for name in self.places):
            (name,) = self.places
            yield self._product(shares[name], self._as_stored(name, _unpack(self.module)))
            return
        products = dict.fromkeys(shares, torch.zeros((), dtype=torch.float64))
        for start, block in packed_columns(self.module, _READ_ENTRIES):
            for name, share in shares.items():
                part = self._part(block, name, self.places[name]).double()
                signs = fingerprint_input(name, share.columns or self._width(), torch.device("cpu"))
                first = share.first_column + start
                products[name] = products[name] + part @ signs[first : first + block.shape[1]]
        yield from (Product(name, product, shares[name]) for name, product in products.items())

    def _part(self, weight: Tensor, name: str, place: Place) -> Tensor:
        """The entries of the weight ``name`` in vLLM's ``weight``, without padding."""
        if place.expert == EVERY_EXPERT:
            experts = range(weight.shape[0])
            return torch.stack([expert_matrix(self.module, weight, expert) for expert in experts])
        if place.expert is not None:
            matrix = expert_matrix(self.module, weight, local_expert(self.module, place.expert))
            rows = matrix.shape[0] // place.parts
            # what is left are rows and columns that the kernel adds
            size = list(self.architecture.shapes[name])
            if (share := self._share(name)) is not None:
                size[0] = size[0] if share.rows is None else share.rows.numel()
                size[1:2] = size[1:2] if share.width is None else [share.width]
            part = matrix.narrow(0, place.part * rows, size[0])
            return part if part.ndim < 2 else part[:, : size[1]]
        if hasattr(self.module, "org_vocab_size"):
            return weight[: vocabulary_rows(self.module)]
        if place.module.endswith(".query_key_value") and hasattr(self.module, "num_kv_heads"):
            return _group_heads(weight, self.module)
        return weight.split(part_sizes(self.module))[place.part] if place.parts > 1 else weight

    def _as_stored(self, name: str, part: Tensor) -> Tensor:
        if (match := _ALL_EXPERTS.fullmatch(name)) is not None and part.ndim == 3:
            rows = self.architecture.shapes[f"{match[1]}.gate_up_proj"][1]
            return part if rows == self.module.w13_weight.shape[1] else part.transpose(1, 2)
        return part.t() if name in self.architecture.transposed else part


def _unpack(module: Any) -> Tensor:
    """The complete weight of a packed linear layer."""
    return torch.cat([block for _, block in packed_columns(module, _READ_ENTRIES)], dim=1)


def _group_heads(stacked: Tensor, module: Any) -> Tensor:
    """Rows of all queries, keys and values, in the order of BLOOM's and Falcon's checkpoints: for each group
    of heads that share keys, its queries, its key and its value.
    """
    groups = module.num_kv_heads
    head = module.head_size
    queries, keys, values = stacked.split([module.num_heads * head, groups * head, groups * head])
    return torch.cat(
        [part.reshape(groups, -1, *part.shape[1:]) for part in (queries, keys, values)], dim=1
    ).flatten(0, 1)


def _attention_copies_match(model: nn.Module, path: str, layer: Any) -> bool:
    """Whether the two halves of ``kv_b_proj`` that latent attention copies for decoding equal the layer's
    weight.
    """
    parent = path.rpartition(".")[0]
    for place, module in model.get_submodule(parent).named_modules():
        attention: Any = module
        if place and hasattr(attention, "W_UK_T"):
            heads, keys, rank = attention.W_UK_T.shape
            weight = _unpack(layer) if hasattr(layer, "cpu_linear") else layer.weight
            stored = weight.reshape(heads, -1, rank)
            keys_match = torch.equal(stored[:, :keys], attention.W_UK_T)
            return keys_match and torch.equal(stored[:, keys:], attention.W_UV.transpose(1, 2))
    return True
