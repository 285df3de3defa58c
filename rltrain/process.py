"""This process among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from rltrain.watchdog import Deadline, no_deadline

T = TypeVar("T")


def no_meeting() -> None:
    """``Process.meet`` of a process that runs alone."""


@dataclass(frozen=True)
class Process:
    """One rank. The defaults describe a process that runs alone, on the CPU, without deadlines.

    gather: concatenates the lists of all ranks in rank order, on every rank; a collective. meet: waits until
    every rank is there, however long that takes while they advance, which no collective allows. deadline:
    wraps every wait. is_main: whether this process, rank 0, writes files and prints.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gather: Callable[[list[Any]], list[Any]] = list
    meet: Callable[[], None] = no_meeting
    deadline: Deadline = no_deadline
    is_main: bool = True

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``world_size``-th item from ``rank`` on: this rank's part of a job that all ranks know."""
        return list(items[self.rank :: self.world_size])


ALONE = Process()
