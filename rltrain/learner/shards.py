"""The part of a weight, or of its optimizer state, that this rank holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rltrain.types.tensor_parts import TensorPart, share_of_rank

__all__ = ["MASTER", "gather_rows", "local_part", "local_rows", "put_full"]

MASTER = "master"  # beside the optimizer's slots: the float32 weight


def local_rows(tensor: Tensor) -> tuple[int, Tensor]:
    """(place of the first number in the whole tensor, this rank's live rows) of what FSDP2 divides; a tensor
    that is not divided is whole on every rank.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor
    mesh = tensor.device_mesh
    if mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
        raise NotImplementedError(
            f"a tensor with placements {tensor.placements} on a mesh of {mesh.ndim} dimensions; expected "
            "rows divided over all ranks"
        )
    rows = -(-tensor.shape[0] // mesh.size())
    row = tensor.numel() // max(tensor.shape[0], 1)
    return min(mesh.get_local_rank() * rows, tensor.shape[0]) * row, tensor.to_local()


def gather_rows(tensor: Tensor) -> Tensor:
    """The whole tensor. A collective where it is divided; rows that are offloaded go by way of the device."""
    if not isinstance(tensor, DTensor):
        return tensor
    rows: Any = tensor.to(tensor.device_mesh.device_type)
    return rows.full_tensor()


@torch.no_grad()
def put_full(tensor: Tensor, full: Tensor) -> None:
    """Copy this rank's part of ``full``, which every rank holds, into ``tensor``. No collective."""
    if isinstance(tensor, DTensor):
        full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(full)


def local_part(name: str, tensor: Tensor, rank: int, ranks: int) -> TensorPart:
    """What this rank saves of ``tensor``: its rows where it is divided, else its share of the whole."""
    start, values = local_rows(tensor.detach())
    part = TensorPart(name, tuple(tensor.shape), start, values.reshape(-1))
    return part if isinstance(tensor, DTensor) else share_of_rank(part, rank, ranks)
