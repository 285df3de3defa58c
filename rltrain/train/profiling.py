"""What a run leaves behind for a look at its speed and memory: a torch profile of some steps, and after an
out-of-memory error a snapshot of the GPU's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rltrain.train.memory import is_gpu_out_of_memory

__all__ = ["MEMORY_FOLDER", "PROFILE_FOLDER", "profile_step", "snapshot_on_out_of_memory"]

PROFILE_FOLDER = "profile"
MEMORY_FOLDER = "memory"
_EVENTS = 100_000  # allocations that a memory snapshot remembers


@contextmanager
def profile_step(folder: Path, step: int, rank: int) -> Iterator[None]:
    """Profiles what runs inside into ``folder``/step-N-rank-R.json, a Chrome trace (ui.perfetto.dev)."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"step-{step}-rank-{rank}.json"))


@contextmanager
def snapshot_on_out_of_memory(folder: Path, rank: int, expect: Callable[[str | None], str]) -> Iterator[None]:
    """Where a GPU's memory runs out inside, write a snapshot of it and say what the plan expected.

    expect: phase of the run -> the plan's line for it; None stands for a phase without a name. Without a GPU
    there is no snapshot. The error becomes a ``torch.OutOfMemoryError``, with its message completed.
    """
    has_gpu = torch.cuda.is_available()
    memory: Any = torch.cuda.memory
    if has_gpu:
        memory._record_memory_history(max_entries=_EVENTS)
    try:
        yield
    except RuntimeError as error:
        if not is_gpu_out_of_memory(error):
            raise
        phase = next(iter(getattr(error, "__notes__", ())), None)
        notes = [expect(phase)]
        if has_gpu:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"out-of-memory-rank-{rank}.pickle"
            memory._dump_snapshot(str(file))
            notes.append(f"what held the memory: {file} (drop it on pytorch.org/memory_viz)")
        raise torch.OutOfMemoryError("; ".join([str(error), *notes])) from error
    finally:
        if has_gpu:
            memory._record_memory_history(enabled=None)
