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
from rltrain.rollout.engines.vllm.shares import Architecture, Place, Product
from rltrain.rollout.packed import pack_requests, unpack_requests
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

        shares = [unpack_requests(share) for share in self.gather(pack_requests(requests))]
        first = sum(map(len, shares[: get_tp_group().rank_in_group]))
        return [request for share in shares for request in share], range(first, first + len(requests))

    def fingerprints(self, products: Sequence[Product]) -> dict[str, Fingerprint]:
        """Of whole weights, by name, from the ``products`` of each rank's shards."""
        everyone = self.gather([replace(product, values=product.values.cpu()) for product in products])
        held: dict[str, list[Product]] = {}
        for product in (product for shards in everyone for product in shards):
            held.setdefault(product.name, []).append(product)
        return {name: product_fingerprint(name, join_products(shards)) for name, shards in held.items()}


def join_products(shards: Sequence[Product]) -> Tensor:
    """The product of a whole weight, (rows,) float64, from those of its shards; NaN where rows are missing,
    or where ranks that hold the same rows differ.
    """
    first = shards[0]
    if first.share.columns is not None:
        return torch.stack([shard.values for shard in shards]).sum(dim=0)
    product = torch.full((first.share.count or len(first.values),), math.nan, dtype=torch.float64)
    for shard in shards:
        rows = slice(None) if shard.share.rows is None else shard.share.rows
        before = product[rows]
        differs = ~before.isnan() & (before != shard.values)
        product[rows] = torch.where(differs, math.inf, shard.values.double())
    return torch.where(product.isinf(), math.nan, product)


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
