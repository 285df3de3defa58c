"""The worker's extension with faults to order: a server that a test starts loads it in place of rltrain's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from rltrain.rollout.worker import extension

_REPACK_HEADS = extension.repack_heads


class PlantedExtension(extension.Extension):
    """rltrain's, and a method that plants a fault in one process."""

    def rltrain_plant(self, fault: str, name: str = "", process: str = "0") -> str:
        """In one process, counted over the data-parallel engines, from now on.

        fault: "head": the head is not packed again after a push; "keep": the weight ``name`` stays what the
        next push makes it; "": none, in every process.
        """
        engine: Any = self.weight_transfer_engine
        if fault == "":
            extension.repack_heads = _REPACK_HEADS
            engine.__dict__.pop("_load", None)
        elif _place(engine.parallel_config) == int(process):
            if fault == "head":
                extension.repack_heads = lambda model: None
            else:
                engine._load = _Keeper(engine._load, name)
        return "planted"


def _place(parallel: Any) -> int:
    return parallel.data_parallel_index * parallel.world_size + parallel.rank


class _Keeper:
    """Loads weights, except ``name`` after its first time."""

    def __init__(self, load: Any, name: str) -> None:
        self._load = load
        self._name = name
        self._kept: Tensor | None = None

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._load(self._replace(name, weight) for name, weight in weights)

    def _replace(self, name: str, weight: Tensor) -> tuple[str, Tensor]:
        if name == self._name:
            self._kept = weight if self._kept is None else self._kept
            weight = self._kept
        return name, weight
