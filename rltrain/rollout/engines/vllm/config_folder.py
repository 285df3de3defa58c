"""The folder from which vLLM reads a model's config: its path is part of the key of vLLM's compile cache, so
that one config must always be read from one path.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from transformers import PreTrainedConfig

__all__ = ["config_folder"]

_DIGITS = 16


def config_folder(config: PreTrainedConfig) -> Path:
    """A folder below vLLM's cache that holds ``config`` alone, and is named after its contents.

    Ranks may call this at the same time. A folder is complete as soon as it has its name.
    """
    root = _cache_root() / "rltrain"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".", ignore_cleanup_errors=True) as name:
        written = Path(name) / "config"
        config.save_pretrained(written)
        folder = root / _digest_folder(written)
        if not folder.exists():
            try:
                written.rename(folder)
            except OSError:
                if not folder.exists():  # else another rank was first
                    raise
    return folder


def _digest_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:_DIGITS]


def _cache_root() -> Path:
    """Where vLLM keeps its compile cache, by the same variables."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("VLLM_CACHE_ROOT") or home / "vllm").expanduser()
