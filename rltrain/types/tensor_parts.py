"""Parts of large tensors, and sources from which a part is read without the whole."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["PartReader", "TensorPart", "read_part", "select_tensors", "shape_in", "share_of_rank"]


@dataclass(frozen=True)
class TensorPart:
    """Neighbouring numbers of a tensor in row-major order.

    start: place of the first in the whole tensor. values: (n,), may be the live memory of the tensor.
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor


def share_of_rank(part: TensorPart, rank: int, ranks: int) -> TensorPart:
    """What ``rank`` writes of a tensor that every rank holds whole: the ranks' shares are the tensor."""
    size = -(-part.values.numel() // ranks)
    first = min(rank * size, part.values.numel())
    return replace(part, start=part.start + first, values=part.values[first : first + size])


class PartReader(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for, whole or in part."""

    @abstractmethod
    def shape_of(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The numbers from ``start`` to ``stop`` in row-major order, (stop - start,), on the CPU."""

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape_of(name)
        return self.read(name, 0, math.prod(shape)).reshape(shape)


@dataclass(frozen=True)
class _Selection(PartReader):
    origin: Mapping[str, Tensor]
    names: Mapping[str, str]  # name in ``origin`` by the name here

    def shape_of(self, name: str) -> tuple[int, ...]:
        return shape_in(self.origin, self.names[name])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return read_part(self.origin, self.names[name], start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def select_tensors(
    tensors: Mapping[str, Tensor], rename: Callable[[str], str | None]
) -> Mapping[str, Tensor]:
    """The tensors that ``rename`` gives a name, under that name; none is read."""
    named = {new: name for name in tensors if (new := rename(name)) is not None}
    return _Selection(tensors, named)


def shape_in(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of one of ``tensors``, which is not read."""
    return tensors.shape_of(name) if isinstance(tensors, PartReader) else tuple(tensors[name].shape)


def read_part(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """The numbers of one of ``tensors`` from ``start`` to ``stop`` in row-major order, (stop - start,)."""
    if isinstance(tensors, PartReader):
        return tensors.read(name, start, stop)
    return tensors[name].flatten()[start:stop]
