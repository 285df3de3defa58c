"""The file of hashes by which a folder of weights is complete. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from rltrain.errors import UserError

MANIFEST = "files.sha256.json"


class DamagedCheckpointError(UserError):
    """A file of a checkpoint is missing, is not what was written, or cannot be understood."""


def file_hashes(folder: Path, skip: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file of ``folder`` but the manifest, by name. skip: names that are left out."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST and str(path.relative_to(folder)) not in skip:
            with open(path, "rb") as file:
                hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
