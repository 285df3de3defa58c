"""What memory a run is said to have taken, and to have: its processes, and the limit of its container."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rltrain.train import memory
from rltrain.train.memory import (
    GPU,
    HOST,
    GpuWatch,
    Memory,
    container_limit,
    is_gpu_out_of_memory,
    largest_share,
    peak_memory,
)

GIB = 2**30


def test_a_gpus_peak_is_what_was_not_free_whoever_held_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch has reserved 70 of 80 GiB, 40 of them the unmapped pages of a sleeping engine; at the worst moment
    # 55 GiB were in use, 2 of them outside of torch
    free = iter([50 * GIB, 25 * GIB, 45 * GIB])
    was_low = threading.Event()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 70 * GIB)

    def mem_get_info(device: int | None = None) -> tuple[int, int]:
        left = next(free, 60 * GIB)
        if left == 25 * GIB:
            was_low.set()
        return left, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    with GpuWatch() as gpu:
        assert was_low.wait(30)
    [_, memory] = peak_memory(gpu)
    assert memory == Memory(GPU, 55 * GIB, 80 * GIB)


def test_both_allocators_say_that_a_gpus_memory_ran_out() -> None:
    assert is_gpu_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_gpu_out_of_memory(RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:118"))
    assert not is_gpu_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_living_child_counts_with_its_peak_and_not_with_what_it_holds_now() -> None:
    code = (
        "import sys; held = bytearray(b'x' * (300 << 20)); del held; print('freed', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"freed\n"
        [memory, *_] = peak_memory(GpuWatch())
        parent_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert child.stdin is not None
        child.stdin.close()
    assert memory.name == "memory" and memory.processes >= 2
    assert memory.peak - parent_peak >= 300 * 2**20


def test_the_size_is_the_smaller_of_the_machines_and_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_size = peak_memory(GpuWatch())[0].size
    monkeypatch.setattr(memory, "container_limit", lambda: float(GIB))
    assert peak_memory(GpuWatch())[0].size == GIB < machine_size
    monkeypatch.setattr(memory, "container_limit", lambda: math.inf)
    assert peak_memory(GpuWatch())[0].size == memory.psutil.virtual_memory().total


def test_the_tightest_group_on_the_way_up_is_the_limit_of_version_2(tmp_path: Path) -> None:
    put(tmp_path / "own", "0::/jobs/run-7\n")
    root = tmp_path / "cgroup"
    put(root / "jobs/run-7/memory.max", "max\n")
    assert container_limit(tmp_path / "own", root) == math.inf
    put(root / "jobs/memory.max", f"{3 * GIB}\n")
    assert container_limit(tmp_path / "own", root) == 3 * GIB
    put(root / "jobs/run-7/memory.max", f"{2 * GIB}\n")
    assert container_limit(tmp_path / "own", root) == 2 * GIB


def test_version_1_has_a_hierarchy_of_its_own_for_memory(tmp_path: Path) -> None:
    put(tmp_path / "own", "5:cpu,cpuacct:/tight\n4:memory:/jobs\n0::/\n")
    root = tmp_path / "cgroup"
    put(root / "memory/jobs/memory.limit_in_bytes", f"{4 * GIB}\n")
    put(root / "memory/tight/memory.limit_in_bytes", f"{GIB}\n")  # not its group of that hierarchy
    assert container_limit(tmp_path / "own", root) == 4 * GIB


def test_inside_a_container_the_mount_is_the_group_and_the_path_is_the_hosts(tmp_path: Path) -> None:
    put(tmp_path / "own", "4:memory:/docker/0123\n")
    put(tmp_path / "cgroup/memory/memory.limit_in_bytes", f"{GIB}\n")
    assert container_limit(tmp_path / "own", tmp_path / "cgroup") == GIB


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert container_limit(tmp_path / "none", tmp_path) == math.inf


def test_ranks_of_one_machine_share_its_memory_and_no_gpu() -> None:
    def rank(host: float, gpu: float) -> list[Memory]:
        return [Memory(HOST, host, 10.0, 3), Memory(GPU, gpu, 8.0)]

    ranks = [("a", rank(4.0, 1.0)), ("b", rank(6.0, 2.0)), ("a", rank(3.0, 7.0)), ("b", rank(0.5, 3.0))]
    assert largest_share(ranks) == [
        Memory(HOST, 7.0, 10.0, 6),
        Memory(GPU, 7.0, 8.0),
    ]  # machine a: 4 + 3, b: 6.5; rank 2's GPU
    assert largest_share([("a", [Memory(HOST, 4.0, 10.0)])]) == [Memory(HOST, 4.0, 10.0)]
