"""Which models' own Python code may run: only that of models named in the recipe.

A model folder may hold code that transformers imports (``auto_map`` in its config).
``model.trust_remote_code`` lists the models whose code may run: a folder, or a model on the Hub at one
commit, ``NAME@COMMIT``. Every loader calls ``trusts``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rltrain.errors import UserError
from rltrain.json_text import parse_json
from rltrain.model_files import local_file, model_errors

KEY = "model.trust_remote_code"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIGS = ("config.json", "tokenizer_config.json")  # whose auto_map names code
_trusted: tuple[str, ...] = ()  # entries trusted by this process while a ``trusting`` block runs


@contextmanager
def trusting(entries: Sequence[str]) -> Iterator[list[str]]:
    """Inside, code of the models in ``entries`` may run.

    Yields lines that describe it. Raises UserError for an entry that is neither a folder nor a commit.
    """
    global _trusted
    before = _trusted
    lines = [_describe(entry) for entry in entries]
    _trusted = (*before, *entries)
    try:
        yield lines
    finally:
        _trusted = before


def trusts(path: str, revision: str | None = None) -> bool:
    """Whether code of the model at ``path`` may run.

    Raises UserError where it is trusted but takes code from another repository.
    """
    if not _is_named(path, revision):
        return False
    _refuse_code_from_elsewhere(path, revision)
    return True


def trust_copy(copy: Path, path: str, revision: str | None) -> None:
    """Trust the code in ``copy`` too, a folder written from the trusted model at ``path``.

    Raises UserError where a file of ``copy`` is not byte for byte the trusted one.
    """
    global _trusted
    if not trusts(path, revision) or not (copies := code_files(copy)):
        return
    originals = code_files(_local_folder(path, revision))
    if changed := sorted(name for name, digest in copies.items() if originals.get(name) != digest):
        raise UserError(
            f"{copy / changed[0]} is not the file of that name in {path}, which {KEY} names: the checkpoint "
            "holds other code than the model it was made from; put that code back, or name "
            f"{copy} under {KEY} if you have read it"
        )
    _trusted = (*_trusted, str(copy))


def code_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the Python files of a model folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def trusted_code() -> dict[str, str]:
    """A digest of the trusted code by entry: of a folder's files, or the commit."""
    return {entry: _digest(entry) for entry in _trusted}


@contextmanager
def refusing_untrusted(path: str, revision: str | None = None) -> Iterator[None]:
    """Inside, transformers' request to let code run becomes a UserError that says how to allow it, and every
    other exception of the libraries an OSError or a ValueError (``model_errors``).
    """
    try:
        with model_errors():
            yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        entry = path if Path(path).is_dir() else f"{path}@{revision or 'COMMIT'}"
        pinned = "" if Path(path).is_dir() else " (40 hex digits, and the same as model.revision)"
        raise UserError(
            f"{path} needs Python code of its own to be loaded, and nothing says that this code may run; "
            f"read it, then name it: {KEY}: [{entry}]{pinned} in the recipe, or --trust-remote-code "
            f"{entry} where there is none"
        ) from error


def _is_named(path: str, revision: str | None) -> bool:
    if Path(path).is_dir():
        return Path(path).resolve() in {Path(entry).resolve() for entry in _trusted}
    return f"{path}@{revision}" in _trusted


def _describe(entry: str) -> str:
    """Which code an entry allows to run. Raises UserError where it is neither a folder nor a commit."""
    if Path(entry).is_dir():
        files = ", ".join(f"{name} {digest[:12]}" for name, digest in code_files(Path(entry)).items())
        return f"code of {entry} may run (sha256): {files or 'it has none'}"
    name, separator, commit = entry.rpartition("@")
    if separator and name and _COMMIT.fullmatch(commit):
        return f"code of {name} at commit {commit} may run"
    raise UserError(
        f"{KEY}: {entry!r} is no folder; for a model on the Hub write NAME@COMMIT with the 40 hex digits of "
        "the commit whose code you have read: a branch or a tag may hold other code tomorrow"
    )


def _digest(entry: str) -> str:
    if not Path(entry).is_dir():
        return entry.rpartition("@")[2]
    return hashlib.sha256(json.dumps(code_files(Path(entry))).encode()).hexdigest()


def _local_folder(path: str, revision: str | None) -> Path:
    config = local_file(path, revision, _CONFIGS[0])
    return Path(path) if config is None else config.parent


def _refuse_code_from_elsewhere(path: str, revision: str | None) -> None:
    """Raises UserError where ``auto_map`` names a class of another repository.

    transformers would take it from that repository's main branch, which nothing pins.
    """
    for name in _CONFIGS:
        file = local_file(path, revision, name)
        settings = {} if file is None else parse_json(file.read_text(encoding="utf-8"))
        mapped = settings.get("auto_map") if isinstance(settings, dict) else None
        for reference in _references(mapped):
            repository, separator, module = reference.rpartition("--")
            if separator and (Path(path).is_dir() or repository != path):
                raise UserError(
                    f"{path}: auto_map of its {name} takes {reference!r} from another repository, which "
                    f"{KEY} cannot pin; copy the model to a folder, put that file there and name the class "
                    f"as {module!r}"
                )


def _references(mapped: Any) -> Iterator[str]:
    """Every class that an ``auto_map`` names; a tokenizer has a slow and a fast one, or none."""
    for value in mapped.values() if isinstance(mapped, dict) else ():
        classes = value if isinstance(value, list) else [value]
        yield from (name for name in classes if isinstance(name, str))
