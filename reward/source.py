"""What identifies the code behind a name in a recipe: a digest of a user's file, or the version of
this package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "rltrain"


def is_user_spec(name: str) -> bool:
    """Whether ``name`` is a ``path/to/file.py:function`` and not a registered name."""
    return ".py:" in name


def source_digest(name: str) -> str:
    """Equal for equal code: ``sha256:...`` of the file in ``path/to/file.py:function``, ``rltrain 0.1.0`` for
    a registered name.

    The digest covers the modules beside the file that it imports, directly or through one another, but no
    installed package. A relative path is read from the current folder. Raises ValueError where the file
    cannot be read.
    """
    if not is_user_spec(name):
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    file = Path(name.rpartition(":")[0]).expanduser().resolve()
    digest = hashlib.sha256()
    for path in source_files(file):
        content = _content(path)
        digest.update(
            f"{path.relative_to(file.parent).as_posix()} {len(content)}\n".encode("utf-8", "surrogateescape")
        )
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def source_files(file: Path) -> list[Path]:
    """``file`` and every module in its folder or below that it imports, in the order in which their
    imports are met.
    """
    files = [file]
    for path in files:  # grows while it is walked
        files += [
            neighbor for neighbor in dict.fromkeys(_neighbors(path, file.parent)) if neighbor not in files
        ]
    return files


def _neighbors(path: Path, folder: Path) -> Iterator[Path]:
    """Files of the modules that ``path`` imports from ``folder``; what is not there is installed or
    missing.
    """
    try:
        tree = ast.parse(_content(path))
    except (SyntaxError, ValueError):  # whoever loads it says so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(folder, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = folder if node.level == 0 else _ancestor(path, node.level)
            if base.is_relative_to(folder):
                yield from _module_files(base, node.module or "")
                for alias in node.names:
                    yield from _module_files(
                        base, f"{node.module}.{alias.name}" if node.module else alias.name
                    )


def _ancestor(path: Path, level: int) -> Path:
    return path.parents[min(level, len(path.parents)) - 1]


def _module_files(folder: Path, dotted: str) -> Iterator[Path]:
    """What importing ``dotted`` from ``folder`` would execute: each package's ``__init__.py`` and the
    module itself.
    """
    place = folder
    for part in filter(None, dotted.split(".")):
        place = place / part
        candidates = (place / "__init__.py", place.with_name(f"{part}.py"))
        yield from (candidate for candidate in candidates if candidate.is_file())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
