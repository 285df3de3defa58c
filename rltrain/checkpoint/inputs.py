"""Digests of a run's inputs other than its recipe, by name: a resumed run must read the same inputs.

The names appear in errors: ``code of reward.functions.0 (my.py:score)``, ``column answer of data.train``,
``files of model.path (m)``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rltrain.model_files import local_file
from rltrain.remote_code import trusted_code
from rltrain.reward.source import is_user_spec, source_digest

_MODEL_KEYS = ("path", "reference", "teacher", "previous")  # the last part of keys that name models
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Samples that are read of a large file of weights; training changes every tensor.
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_PROSE = (".md",)
_ABSENT = "absent"


def code_digests(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Digests of every ``path/to/file.py:name`` in any section of a recipe as plain data, and of trusted code
    of models.
    """
    specs = {key: value for key, value in _texts(recipe) if is_user_spec(value)}
    digests = {
        f"code of {key.removesuffix('.name')} ({value})": source_digest(value) for key, value in specs.items()
    }
    return digests | {f"code of the model {entry}": digest for entry, digest in trusted_code().items()}


def model_digests(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the models that a recipe names: of a folder's files, large ones by samples; or a Hub model's
    commit, where its files are on this machine.
    """
    digests: dict[str, str] = {}
    sections = {name: section for name, section in recipe.items() if name not in ("data", "about")}
    for key, path in _texts(sections):
        if key.rpartition(".")[2] not in _MODEL_KEYS:
            continue
        revision = recipe["model"].get("revision") if path == recipe["model"]["path"] else None
        digest = _folder_digest(Path(path)) if Path(path).is_dir() else _commit_of(path, revision)
        if digest is not None:
            digests[f"files of {key} ({path})"] = digest
    return digests


def column_digests(source: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Digests of each column of ``rows``, in their order.

    source: the key that names the data, such as "data.train".
    """
    columns: dict[str, Any] = {}
    number = 0
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if name not in columns:
                columns[name] = hashlib.sha256()
            columns[name].update(f"{number} {json.dumps(value, sort_keys=True, default=repr)}\n".encode())
    return {f"column {name} of {source}": f"sha256:{digest.hexdigest()}" for name, digest in columns.items()}


def changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each input that changed: ``name: saved -> now``."""
    names = dict.fromkeys((*saved, *now))
    pairs = {name: (saved.get(name, _ABSENT), now.get(name, _ABSENT)) for name in names}
    return [
        f"{name}: {before[:19]} -> {after[:19]}" for name, (before, after) in pairs.items() if before != after
    ]


def _texts(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in plain data."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, Mapping | list):
        items = data.items() if isinstance(data, Mapping) else enumerate(data)
        for name, value in items:
            yield from _texts(value, f"{key}.{name}" if key else str(name))


def _commit_of(path: str, revision: str | None) -> str | None:
    """The commit of a Hub model: the Hub's cache keeps snapshots in folders named after their commits."""
    try:
        config = local_file(path, revision, "config.json")
    except (OSError, ValueError):
        return None
    return config.parent.name if config is not None and _COMMIT.fullmatch(config.parent.name) else None


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _PROSE:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            for block in _blocks(path):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _blocks(path: Path) -> Iterator[bytes]:
    """A file's content, or evenly spread samples of large weights."""
    size = path.stat().st_size
    if path.suffix not in _WEIGHTS or size <= _SAMPLES * _SAMPLE_BYTES:
        yield path.read_bytes()
        return
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
