"""Streams of tensors in safetensors files: nothing is collected, and what is read is what came."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rltrain.checkpoint.tensor_files import read_tensors, tensor_files, write_tensors

ENTRIES = 250  # of each tensor: 1,000 bytes


class Stream:
    """Makes tensors one by one and notes how many bytes of them are alive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.peak = 0
        self._alive: list[Any] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for number in range(self.count):
            tensor = torch.full((ENTRIES,), float(number))
            self._alive.append(tensor.untyped_storage()._weak_ref())
            self.look()
            yield f"layers.{number}.weight", tensor
            del tensor
        self.look()

    def look(self) -> None:
        gc.collect()
        self._alive = [storage for storage in self._alive if not torch.UntypedStorage._expired(storage)]
        self.peak = max(self.peak, len(self._alive) * ENTRIES * 4)


@pytest.mark.parametrize(("limit", "files"), [(None, 1), (3000, 4), (3999, 4), (1, 10)])
def test_what_was_written_is_read(tmp_path: Path, limit: int | None, files: int) -> None:
    stream = ((f"layers.{number}.weight", torch.full((ENTRIES,), float(number))) for number in range(10))
    write_tensors(tmp_path, "optimizer", stream, limit=limit)
    assert len(tensor_files(tmp_path, "optimizer")) == files
    tensors = read_tensors(tmp_path, "optimizer")
    assert sorted(tensors) == sorted(f"layers.{number}.weight" for number in range(10))
    assert all((tensors[f"layers.{number}.weight"] == number).all() for number in range(10))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}


def test_one_file_of_tensors_is_in_memory_at_a_time(tmp_path: Path) -> None:
    stream = Stream(20)
    write_tensors(tmp_path, "model", stream, limit=3000)
    assert stream.peak == 4000  # a file, and the tensor that does not fit it


def test_views_of_one_tensor_are_written_each_by_itself(tmp_path: Path) -> None:
    fused = torch.arange(12.0).view(4, 3)
    parts = {"first": fused[:2], "second": fused[2:], "turned": fused.T, "whole": fused, "again": fused}
    write_tensors(tmp_path, "model", parts.items())
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == parts.keys()
    assert all(torch.equal(stored[name], part) for name, part in parts.items())


def test_no_tensor_makes_an_empty_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, "optimizer", ())
    assert read_tensors(tmp_path, "optimizer") == {}


def test_a_folder_without_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        read_tensors(tmp_path, "model")
