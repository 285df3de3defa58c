"""Tensors that each rank writes its own parts of, by torch.distributed.checkpoint, and that any number of
ranks reads in any other parts.

A tensor is stored as a row of numbers, cut where the ranks' parts end: FSDP2 divides by rows, ZeRO anywhere.
The index of the files is a pickle, as torch writes it: open checkpoints of your own only.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from rltrain.types.tensor_parts import PartReader, TensorPart

__all__ = ["INDEX", "ShardedTensors", "write_parts"]

INDEX = ".metadata"  # torch's name for the file that lists all parts, written last
_SHAPES = "shapes"  # of the whole tensors, in the index


def write_parts(folder: Path, parts: list[TensorPart], group: Any) -> list[Path]:
    """Write this rank's ``parts`` into ``folder``; returns the files that it wrote. A collective.

    group: a process group for CPU tensors that no other thread uses; None: this process alone. Raises
    OSError where a rank's disk refuses.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # of one process
    planner = _PartPlanner(parts)
    writer = _Writer(folder)
    try:
        save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _cause_of(error) from error
    rank = 0 if group is None else torch.distributed.get_rank(group)
    return sorted(folder.glob(f"__{rank}_*.distcp"))


def _cause_of(error: CheckpointException) -> BaseException:
    """The error of the first rank that failed, the disk's before others."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


class _Writer(FileSystemWriter):
    """Says what the disk said: torch 2.13 raises RuntimeError where it cannot end a file that it could not
    write.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            before: BaseException | None = error
            while before is not None and not isinstance(before, OSError):
                before = before.__cause__ or before.__context__
            raise before or error from None


class _PartPlanner(DefaultSavePlanner):
    """Plans one entry for each part of this rank."""

    def __init__(self, parts: list[TensorPart]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = {(part.name, part.start): part for part in parts}

    def create_local_plan(self) -> SavePlan:
        shapes = {part.name: part.shape for part in self._parts.values()}
        items = [_write_item(part) for part in self._parts.values() if part.values.numel()]
        self.plan = SavePlan(items, planner_data=shapes)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = {
            _SHAPES: {name: shape for plan in all_plans for name, shape in plan.planner_data.items()}
        }
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        offset = write_item.index.offset
        assert offset is not None
        return self._parts[write_item.index.fqn, offset[0]].values


def _write_item(part: TensorPart) -> WriteItem:
    start = torch.Size([part.start])
    chunk = ChunkStorageMetadata(start, part.values.shape)
    properties = TensorProperties(dtype=part.values.dtype)
    data = TensorWriteData(chunk, properties, torch.Size([math.prod(part.shape)]))
    return WriteItem(MetadataIndex(part.name, start), WriteItemType.SHARD, tensor_data=data)


class ShardedTensors(PartReader):
    """The tensors in ``folder``, which ``write_parts`` wrote. Reads no tensor before it is asked for one.

    Raises OSError, or what pickle raises, where the index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._shapes: Mapping[str, tuple[int, ...]] = metadata.planner_data[_SHAPES]
        self._stored: Mapping[str, Any] = metadata.state_dict_metadata  # TensorStorageMetadata

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        stored = self._stored[name]
        values = torch.empty(max(stop - start, 0), dtype=stored.properties.dtype)
        items = [
            item for chunk in stored.chunks if (item := _read_item(name, chunk, start, stop)) is not None
        ]
        planner = _IntoTensor(values)
        self._reader.read_data(LoadPlan(items), planner).wait()
        return values


def _read_item(name: str, chunk: ChunkStorageMetadata, start: int, stop: int) -> ReadItem | None:
    """What of the numbers from ``start`` to ``stop`` is in ``chunk``; None: nothing."""
    first = chunk.offsets[0]
    begin = max(first, start)
    length = min(first + chunk.sizes[0], stop) - begin
    if length <= 0:
        return None
    return ReadItem(
        LoadItemType.TENSOR,
        MetadataIndex(name),
        torch.Size([begin - start]),
        MetadataIndex(name, chunk.offsets),
        torch.Size([begin - first]),
        torch.Size([length]),
    )


class _IntoTensor(DefaultLoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = values

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._values
