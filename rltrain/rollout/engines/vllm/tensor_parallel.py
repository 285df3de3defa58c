"""Several ranks that hold one engine together, each a shard of every large weight.

vLLM computes a token on all of them at once, so that they must ask for the same prompts in the same order. A
weight W is proved without gathering it: the ranks' products with the signs v add up to W v where its columns
are divided, and follow one another where its rows are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rltrain.errors import UserError
from rltrain.rollout.engines.vllm.layers import Architecture, Place, ShardProduct
from rltrain.tensor_ops import Fingerprint, product_fingerprint
from rltrain.types.samples import Request

__all__ = ["EngineRanks", "find_undividable", "join_products", "require_ranks"]


@dataclass(frozen=True)
class EngineRanks:
    """The neighbouring ranks of one engine. Every method is a collective of theirs."""

    size: int

    def gather(self, value: Any) -> list[Any]:
        """Each rank's ``value``, in order."""
        from vllm.distributed.parallel_state import get_tp_group

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=get_tp_group().cpu_group)
        return values

    def pool(self, requests: Sequence[Request]) -> tuple[list[Request], range]:
        """The requests of all ranks, and the places of this rank's among them."""
        from vllm.distributed.parallel_state import get_tp_group

        shares = self.gather(list(requests))
        first = sum(map(len, shares[: get_tp_group().rank_in_group]))
        return [request for share in shares for request in share], range(first, first + len(requests))

    def fingerprints(
        self, products: Mapping[str, ShardProduct], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Fingerprint]:
        """Of whole weights, by name, from the ``products`` of each rank's shards. shapes: of the wholes."""
        everyone = self.gather(
            {name: replace(shard, values=shard.values.double().cpu()) for name, shard in products.items()}
        )
        return {
            name: product_fingerprint(name, join_products([held[name] for held in everyone], shapes[name]))
            for name in products
        }


def join_products(shards: Sequence[ShardProduct], shape: tuple[int, ...]) -> Tensor:
    """The product of a whole weight, (rows,) float64, from those of its shards; NaN where they do not fit, or
    where ranks that hold the same rows differ.

    shape: of the whole weight.
    """
    rows = shape[0]
    values = [shard.values for shard in shards]
    if all(shard.adds for shard in shards):
        return torch.stack(values).sum(dim=0)
    copies, rest = divmod(sum(map(len, values)), rows)
    held = values[:: max(copies, 1)]
    different = any(not torch.equal(value, held[place // copies]) for place, value in enumerate(values))
    if rest or different:
        return torch.full((rows,), math.nan, dtype=torch.float64)
    return torch.cat(list(held))


def require_ranks(size: int, world_size: int) -> None:
    """Raises UserError unless ``world_size`` ranks make whole engines of ``size``."""
    if world_size % size:
        raise UserError(
            f"rollout.vllm.tensor_parallel is {size}, but {world_size} ranks were started: an engine takes "
            f"{size} of them; start a multiple with accelerate launch --num_processes, or lower it"
        )


def find_undividable(places: Mapping[str, Place], architecture: Architecture) -> Iterator[str]:
    """Weights whose shards vLLM keeps in a form that this module does not know."""
    for name, place in places.items():
        is_grouped = place.module.endswith((".query_key_value", ".kv_b_proj"))
        if place.expert is not None or is_grouped or name in architecture.transposed:
            yield name
