"""The memory that a process holds after a step: its own, and its GPU's as torch counts it."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
_GIB = 2**30


def memory_metrics() -> dict[str, float]:
    """GiB of this process: resident now and at most so far; with a GPU also what torch has allocated and
    reserved on it now, and has allocated at most since the process started.

    What vLLM, NCCL and the CUDA context hold besides torch's allocator is not in it.
    """
    size = {
        "memory/process": float(psutil.Process().memory_info().rss),
        "memory/process_peak": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT),
    }
    if torch.cuda.is_available():
        size["memory/gpu_allocated"] = float(torch.cuda.memory_allocated())
        size["memory/gpu_reserved"] = float(torch.cuda.memory_reserved())
        size["memory/gpu_peak"] = float(torch.cuda.max_memory_allocated())
    return {name: value / _GIB for name, value in size.items()}
