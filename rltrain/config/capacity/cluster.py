"""GPUs and the way in which a learner is divided among them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Backend(StrEnum):
    """What ``accelerate launch`` starts (recipes/accelerate); one GPU needs none of them."""

    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


@dataclass(frozen=True)
class Cluster:
    """gpus: of the learner. gpu_bytes: what ``torch.cuda.mem_get_info`` calls the total of one GPU.
    server_gpus: of a vLLM server that has its own; 0: the engine samples on the learner's.
    """

    gpus: int
    gpu_bytes: int
    backend: Backend
    gpus_per_node: int = 8
    server_gpus: int = 0

    @property
    def sampling_gpus(self) -> int:
        return self.server_gpus or self.gpus

    @property
    def shards(self) -> int:
        """Parts into which FSDP2 and ZeRO divide."""
        return self.gpus

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def form(self) -> str:
        """The backend's name, or "one" for a single GPU, where nothing is wrapped."""
        return "one" if self.gpus == 1 else self.backend.value
