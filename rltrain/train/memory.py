"""How much memory a run has taken at its peak, and how much there is for it."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = ["GPU", "HOST", "Memory", "container_limit", "largest_share", "peak_memory"]

HOST, GPU = "memory", "GPU memory"
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


@dataclass(frozen=True)
class Memory:
    """Peak use of one memory, in bytes."""

    name: str
    peak: float
    size: float
    processes: int = 1  # whose peaks were added


def peak_memory() -> list[Memory]:
    """Of this process with those it started, so far, and of the GPU if there is one. Call it while the reward
    workers live.

    Peaks of several processes need not come at one time, and pages that they share count more than once: the
    sum is an upper bound. Of processes that are gone the system knows only the largest one's peak.
    """
    children = list(_children_peaks())
    gone = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT + max(sum(children), gone)
    found = [Memory(HOST, peak, min(psutil.virtual_memory().total, container_limit()), 1 + len(children))]
    if torch.cuda.is_available():
        found.append(Memory(GPU, torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]))
    return found


def largest_share(ranks: Sequence[tuple[str, Sequence[Memory]]]) -> list[Memory]:
    """Of each memory the fullest one. ranks: (machine, what ``peak_memory`` says there) of every rank.

    Ranks of one machine share its memory, so their peaks are added; a GPU is one rank's own.
    """
    found: dict[tuple[str, str], Memory] = {}
    for rank, (machine, memories) in enumerate(ranks):
        for one in memories:
            key = (one.name, machine) if one.name == HOST else (one.name, str(rank))
            before = found.get(key, Memory(one.name, 0.0, one.size, 0))
            found[key] = Memory(
                one.name, before.peak + one.peak, min(before.size, one.size), before.processes + one.processes
            )
    named = dict.fromkeys(one.name for one in found.values())
    return [
        max((one for one in found.values() if one.name == name), key=lambda one: one.peak / one.size)
        for name in named
    ]


def _children_peaks() -> Iterator[float]:
    """Bytes, of each process below this one: its peak where Linux says it, else what it holds now."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            held = float(child.memory_info().rss)
            yield max(held, _high_water(Path(f"/proc/{child.pid}/status")))


def _high_water(status: Path) -> float:
    """Bytes: the line VmHWM of a process's status; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def container_limit(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the control groups of this process (version 2 or 1) leave it, the tightest one's; infinity
    where none sets a limit.

    own: in which group it is, a line "number:controllers:/path" for each hierarchy. root: where the
    hierarchies are mounted; inside a container that may be the group's own folder, and the path one of the
    host's.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    limits = [float("inf")]
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = mounted / path.lstrip("/")
        for folder in [group, *group.parents]:
            limits.append(_bytes_in(folder / name))
            if folder == mounted:
                break
    return min(limits)


def _bytes_in(file: Path) -> float:
    """The number in ``file``; infinity where there is none, or the word max."""
    with contextlib.suppress(OSError, ValueError):
        return float(int(file.read_text(encoding="utf-8")))
    return float("inf")
