"""Checkpoints that every rank writes its own parts of, while training goes on; one is written at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rltrain.checkpoint.manifest import MANIFEST, file_hashes
from rltrain.checkpoint.run_folder import directory_atomic
from rltrain.checkpoint.run_state import SHARDS, RunState, write_plain_state
from rltrain.checkpoint.shards import write_parts
from rltrain.errors import UserError
from rltrain.process import Process
from rltrain.types.tensor_parts import TensorPart

__all__ = ["BackgroundSave"]


@dataclass
class BackgroundSave:
    """Writes checkpoints of parts. Every rank calls ``start`` and ``wait`` at the same steps.

    group: as in ``write_parts``, for the thread that writes. parts: this rank's, may be live
    memory. finish: called on the main process when a checkpoint stands under its name.
    """

    process: Process
    group: Any
    parts: Callable[[], Iterable[TensorPart]]
    finish: Callable[[], None]
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _running: Future[None] | None = None

    def start(self, out: Path, state: RunState) -> None:
        """Copy the parts to the host and begin to write the new folder ``out``, after the save before it.

        Training may change the tensors when this returns. Raises what ``wait`` does; UserError where a rank
        does not see the folder of the main process.
        """
        self.wait()
        steps = ExitStack()
        temporary = out
        if self.process.is_main:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = steps.enter_context(directory_atomic(out))
            write_plain_state(temporary, state)
            (temporary / SHARDS).mkdir()
        temporary = self.process.gather([temporary])[0]
        if not all(self.process.gather([(temporary / SHARDS).is_dir()])):
            raise UserError(
                f"{out.parent} is not the same folder on every node, and checkpoint.format sharded has every "
                "rank write into it; use a shared file system, or checkpoint.format whole"
            )
        copies = [replace(part, values=_copy_to_host(part.values)) for part in self.parts()]
        self._running = self._thread.submit(self._write, temporary, copies, steps)

    def wait(self) -> None:
        """Return when no save is running. Raises what the last one raised, OSError where a disk refused."""
        running = self._running
        self._running = None
        if running is not None:
            with self.process.deadline("the other ranks", "to write their parts of the checkpoint"):
                running.result()

    def close(self) -> None:
        """End the thread, after the save that is running; its error is that of a run that ends anyway."""
        with self.process.deadline("the other ranks", "to write their parts of the checkpoint"):
            self._thread.shutdown(wait=True)

    def _write(self, folder: Path, parts: list[TensorPart], steps: ExitStack) -> None:
        with steps:  # the folder gets its name when this ends, or is removed
            files = write_parts(folder / SHARDS, parts, self.group)
            hashes = self._gather({str(path.relative_to(folder)): _hash(path) for path in files})
            if self.process.is_main:
                rest = file_hashes(folder, skip=hashes)
                listed = json.dumps(dict(sorted({**hashes, **rest}.items())), indent=2)
                (folder / MANIFEST).write_text(listed + "\n", encoding="utf-8")
        if self.process.is_main:
            self.finish()

    def _gather(self, hashes: dict[str, str]) -> dict[str, str]:
        """The hashes of all ranks' files; each rank reads only its own."""
        if self.group is None:
            return hashes
        everyone: list[Any] = [None] * self.process.world_size
        torch.distributed.all_gather_object(everyone, hashes, group=self.group)
        return {name: digest for some in everyone for name, digest in some.items()}


def _copy_to_host(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to("cpu", copy=True).contiguous()


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
