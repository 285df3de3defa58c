"""Tensors written as they arrive, into safetensors files of bounded size, named as Hugging Face folders name
them.

A stream of weights is never collected: one file's worth of tensors is in memory at a time, and on the device
only the tensor that is being copied.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["FILE_BYTES", "read_tensors", "tensor_files", "write_tensors"]

FILE_BYTES = 5 * 10**9  # of one file; a larger tensor has a file of its own
_METADATA = {"format": "pt"}  # transformers reads it


def write_tensors(
    folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], *, limit: int | None = None
) -> None:
    """Writes ``stem.safetensors``, or ``stem-00001-of-00002.safetensors`` and so on with an index.

    limit: bytes of one file; None: FILE_BYTES. Raises OSError or SafetensorError when the disk refuses.
    """
    limit = FILE_BYTES if limit is None else limit
    files: list[Path] = []
    names: list[list[str]] = []
    part: dict[str, Tensor] = {}
    storages: set[int] = set()  # addresses of those in ``part``
    filled = 0
    total = 0

    def write_part() -> None:
        path = folder / f"{stem}-{len(files) + 1:05d}.safetensors"
        save_file(part, path, metadata=_METADATA)
        files.append(path)
        names.append(list(part))
        part.clear()
        storages.clear()

    for name, tensor in tensors:
        if part and filled + tensor.nbytes > limit:
            write_part()
            filled = 0
        part[name] = _copy_to_cpu(tensor, storages)
        storages.add(part[name].untyped_storage().data_ptr())
        filled += tensor.nbytes
        total += tensor.nbytes
        del tensor
    if part or not files:
        write_part()

    if len(files) == 1:
        files[0].rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for path, contents in zip(files, names, strict=True):
        final = path.with_name(f"{path.stem}-of-{len(files):05d}.safetensors")
        path.rename(final)
        weight_map |= dict.fromkeys(contents, final.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def tensor_files(folder: Path, stem: str) -> list[Path]:
    """The files that ``write_tensors`` wrote; empty where there are none."""
    return sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")])


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Every tensor of those files by name, mapped from the disk.

    Raises FileNotFoundError where there are none.
    """
    files = tensor_files(folder, stem)
    if not files:
        raise FileNotFoundError(f"{folder}: no {stem}.safetensors")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _copy_to_cpu(tensor: Tensor, storages: Collection[int]) -> Tensor:
    """``tensor`` as safetensors takes it: on the CPU, contiguous, the only one in its storage.

    storages: addresses that are taken; bitsandbytes keeps one table for the states of all weights.
    """
    held = tensor.detach()
    storage = held.untyped_storage()
    if held.device.type != "cpu" or storage.nbytes() != held.nbytes or storage.data_ptr() in storages:
        held = held.to("cpu", copy=True)
    return held.contiguous()
