"""Which part of a weight of the checkpoint this process holds, where vLLM divides layers between processes.

Column-parallel layers, embeddings and heads hold some rows of the weight, row-parallel ones some columns.
Keys and values are held several times where there are more processes than key heads; other weights are whole
in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.errors import UserError

EVERY_EXPERT = -1


@dataclass(frozen=True)
class Architecture:
    """What transformers knows about a model's checkpoint."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]  # by name
    parameters: frozenset[str]  # names of the trained weights, tied weights once
    ties: Mapping[str, str]  # second name of a weight to its first
    transposed: frozenset[str]  # weights stored as (in, out)


@dataclass(frozen=True)
class Place:
    """Where vLLM keeps a weight of the checkpoint: a part of a parameter of a module."""

    module: str
    parameter: str
    part: int = 0  # index among the parts
    parts: int = 1  # stacked in the parameter
    expert: int | None = None  # EVERY_EXPERT: all experts


@dataclass(frozen=True)
class Share:
    """rows: of the weight's ``count`` rows, as indexes; None: all. first_column, width: of ``columns``; None:
    all.

    copy: processes with one copy number hold one copy of the weight between them.
    """

    name: str
    rows: Tensor | None = None
    count: int | None = None
    first_column: int = 0
    width: int | None = None
    columns: int | None = None
    copy: int = 0

    @property
    def is_split(self) -> bool:
        return self.rows is not None or self.columns is not None


@dataclass(frozen=True)
class Product:
    """``values (rows,)`` of y = W v, in float64; parts of a sum where the share has some columns only."""

    name: str
    values: Tensor
    share: Share


def find_share(
    module: Any, parameter: str, name: str, place: Place, architecture: Architecture
) -> Share | None:
    """The share of the weight ``name`` in ``module``; None: the expert is another process's.

    Raises UserError for layers whose division is not known.
    """
    if place.expert is not None:
        return _expert_share(module, name, place, architecture)
    size = getattr(module, "tp_size", 1)
    if size == 1:
        return Share(name)
    rank = int(getattr(module, "tp_rank", 0))
    if hasattr(module, "shard_indices"):
        start = module.shard_indices.org_vocab_start_index
        rows = torch.arange(start, start + vocabulary_rows(module))
        return Share(name, rows, architecture.shapes[name][0])
    if name in architecture.transposed or place.module.endswith(".query_key_value"):
        raise UserError(
            f"{name!r}: the division of this layer between {size} processes is not known, so that no push of "
            "it could be proved; use tensor_parallel 1"
        )
    # a layer that is whole in every process tells no size of a partition
    if hasattr(module, "input_size_per_partition") and module.input_size_per_partition < module.input_size:
        if parameter != "weight":
            return Share(name, copy=rank)
        width = module.input_size_per_partition
        return Share(name, first_column=rank * width, width=width, columns=module.input_size)
    if hasattr(module, "output_size_per_partition") and module.output_size_per_partition < module.output_size:
        return _row_share(module, name, place, rank, architecture.shapes[name][0])
    return Share(name, copy=rank)


def _row_share(module: Any, name: str, place: Place, rank: int, count: int) -> Share:
    """The rows of a weight, or of the stacked weights, in a column-parallel layer."""
    sizes = part_sizes(module)
    replicas = int(getattr(module, "num_kv_head_replicas", 1))
    if place.parts > 1:
        divisor = replicas if replicas > 1 and place.part > 0 else 1
        start = rank // divisor * sizes[place.part]
        return Share(name, torch.arange(start, start + sizes[place.part]), count, copy=rank % divisor)
    if replicas > 1:
        raise UserError(f"{name!r}: keys and values are copied within a fused weight; use fewer processes")
    rows: list[Tensor] = []
    offset = 0
    for size in sizes:
        rows.append(torch.arange(offset + rank * size, offset + (rank + 1) * size))
        offset += size * module.tp_size
    return Share(name, torch.cat(rows), count)


def _expert_share(module: Any, name: str, place: Place, architecture: Architecture) -> Share | None:
    parallel = module.moe_config.moe_parallel_config if hasattr(module, "moe_config") else None
    if parallel is None or (parallel.tp_size == 1 and not parallel.use_ep):
        return Share(name)
    if place.expert == EVERY_EXPERT:
        raise UserError(
            f"{name!r}: experts of one weight are divided between processes, so that no push of it could be "
            "proved; use tensor_parallel 1"
        )
    if parallel.tp_size > 1 and getattr(parallel, "dp_size", 1) > 1:
        raise UserError(
            f"{name!r}: experts are divided over data-parallel engines, so that no push could be proved; use "
            "expert parallelism or data_parallel 1"
        )
    assert place.expert is not None
    if parallel.use_ep and local_expert(module, place.expert) < 0:
        return None
    if parallel.tp_size == 1:
        return Share(name, copy=SHARED_COPY)
    shape = architecture.shapes[name]
    rank = parallel.tp_rank
    if place.parameter.startswith("w13"):
        rows = shape[0] // parallel.tp_size
        return Share(name, torch.arange(rank * rows, (rank + 1) * rows), shape[0], copy=SHARED_COPY)
    if len(shape) < 2:
        return Share(name, copy=rank)
    width = shape[1] // parallel.tp_size
    return Share(name, first_column=rank * width, width=width, columns=shape[1])


# Of experts, which all processes of a server divide, those of several data-parallel engines included.
SHARED_COPY = -1


def local_expert(module: Any, expert: int) -> int:
    """The place of an expert among those of this process; -1: it is another process's."""
    manager = getattr(module, "expert_map_manager", None)
    mapping = None if manager is None else manager.expert_map
    return expert if mapping is None else int(mapping[expert])


def part_sizes(module: Any) -> list[int]:
    """Rows of each stacked weight in this process."""
    return list(getattr(module, "output_partition_sizes", None) or module.output_sizes)


def vocabulary_rows(module: Any) -> int:
    """Rows of a vocabulary without padding, in this process."""
    indices = getattr(module, "shard_indices", None)
    return module.org_vocab_size if indices is None else indices.num_org_elements
