"""What hf_xet stores in a folder instead of a server: an address ``local://FOLDER`` lets the real library cut
files into chunks and write them there.
"""

from __future__ import annotations

import importlib
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RECORD = 48  # bytes of each record in a shard
_VERIFICATION = 1 << 31  # flag of a file: as many verification records as segments follow
_METADATA = 1 << 30  # flag of a file: a record with its SHA-256 follows
_END = b"\xff" * 32


def address_of(folder: Path) -> str:
    return f"local://{folder}"


def read_content(folder: Path, sha256: str) -> bytes | None:
    """The file with this SHA-256, put together again by hf_xet; None where it was not uploaded whole."""
    hf_xet: Any = importlib.import_module("hf_xet")  # its types leave these names out
    for file_hash, stored in _files_of(folder):
        if stored == sha256:
            with tempfile.TemporaryDirectory() as out:
                target = Path(out) / "file"
                session = hf_xet.XetSession()
                with session.new_file_download_group(endpoint=address_of(folder)) as group:
                    group.start_download_file(hf_xet.XetFileInfo(file_hash), str(target))
                return target.read_bytes()
    return None


def _files_of(folder: Path) -> Iterator[tuple[str, str]]:
    """(hash, SHA-256) of every file that the shards in ``folder`` list."""
    for shard in sorted((folder / "xet/xorbs/shards").glob("*.mdb")):
        data = shard.read_bytes()
        place = _RECORD  # behind the header
        while data[place : place + 32] != _END:
            file_hash = data[place : place + 32]
            flags, segments = struct.unpack_from("<II", data, place + 32)
            place += _RECORD * (1 + segments * (2 if flags & _VERIFICATION else 1))
            if flags & _METADATA:
                yield _hex(file_hash), _hex(data[place : place + 32])
                place += _RECORD


def _hex(value: bytes) -> str:
    """A hash as text: four little-endian words of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", value))
