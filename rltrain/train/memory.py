"""The peak memory of a run, and how much memory it may use."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = [
    "GPU",
    "HOST",
    "GpuWatch",
    "Memory",
    "container_limit",
    "is_gpu_out_of_memory",
    "largest_share",
    "peak_memory",
]

HOST = "memory"
GPU = "GPU memory"
_LOOK_SECONDS = 0.1
_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss


@dataclass(frozen=True)
class Memory:
    """Peak use of one memory, in bytes."""

    name: str
    peak: float
    size: float
    processes: int = 1  # whose peaks were added


class GpuWatch:
    """Notes the least free memory of this rank's GPU while its block runs; without a GPU nothing.

    What torch has reserved says too little and too much: vLLM, NCCL and the context allocate outside of it,
    and it counts the pages of a sleeping engine, which are unmapped behind torch's back. torch keeps what it
    has once reserved, so that looking a few times a second misses no peak of an update.
    """

    def __init__(self) -> None:
        self.least_free = math.inf  # bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rltrain-gpu-watch", daemon=True)
        self._device = 0

    def look(self) -> None:
        """Notes the memory that is free now."""
        self.least_free = min(self.least_free, torch.cuda.mem_get_info(self._device)[0])

    def __enter__(self) -> GpuWatch:
        if torch.cuda.is_available():
            self._device = torch.cuda.current_device()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
            self.look()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self.look()


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out: torch says so by a class, vLLM's allocator in a plain RuntimeError."""
    words = "CUDA Error: out of memory".lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and words in str(error).lower()
    )


def peak_memory(gpu: GpuWatch) -> list[Memory]:
    """The peak so far of this process and the processes it started, and of the GPU if there is one. Call it
    while the reward workers live.

    gpu: has watched the run.

    The peaks of several processes need not coincide, and pages that they share count more than once, so the
    sum is an upper bound. Of the processes that have ended the system knows only the largest peak.
    """
    children = list(_child_peaks())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT + max(sum(children), ended)
    size = min(psutil.virtual_memory().total, container_limit())
    memories = [Memory(HOST, peak, size, 1 + len(children))]
    if torch.cuda.is_available():
        gpu.look()
        size = torch.cuda.mem_get_info()[1]
        memories.append(Memory(GPU, size - gpu.least_free, size))
    return memories


def largest_share(ranks: Sequence[tuple[str, Sequence[Memory]]]) -> list[Memory]:
    """The fullest memory of each kind. ranks: (machine, result of ``peak_memory``) of every rank.

    The ranks of a machine share its memory, so their peaks are added; each GPU belongs to a single rank.
    """
    totals: dict[tuple[str, str], Memory] = {}
    for rank, (machine, memories) in enumerate(ranks):
        for memory in memories:
            key = (memory.name, machine) if memory.name == HOST else (memory.name, str(rank))
            total = totals.get(key, Memory(memory.name, 0.0, memory.size, 0))
            totals[key] = Memory(
                memory.name,
                total.peak + memory.peak,
                min(total.size, memory.size),
                total.processes + memory.processes,
            )
    fullest: dict[str, Memory] = {}
    for total in totals.values():
        other = fullest.get(total.name)
        if other is None or total.peak / total.size > other.peak / other.size:
            fullest[total.name] = total
    return list(fullest.values())


def _child_peaks() -> Iterator[float]:
    """Bytes of each descendant process: its peak where Linux reports it, else its current use."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            current = float(child.memory_info().rss)
            yield max(current, _reported_peak(Path(f"/proc/{child.pid}/status")))


def _reported_peak(status: Path) -> float:
    """Bytes: the line VmHWM of a process's status file; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def container_limit(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """The tightest limit, in bytes, of the control groups of this process (version 2 or 1); infinity where
    none sets a limit.

    groups: a file that names the process's groups, a line "number:controllers:/path" for each hierarchy.
    root: the folder where the hierarchies are mounted. Inside a container that may be the group's own folder,
    while the path is one of the host.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    limits = [float("inf")]
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = mounted / path.lstrip("/")
        for folder in [group, *group.parents]:
            limits.append(_read_bytes(folder / name))
            if folder == mounted:
                break
    return min(limits)


def _read_bytes(file: Path) -> float:
    """The number in ``file``; infinity where the file is missing or contains the word max."""
    with contextlib.suppress(OSError, ValueError):
        return float(int(file.read_text(encoding="utf-8")))
    return float("inf")
