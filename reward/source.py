"""A user's file in a recipe: identified by a digest of its code, and imported by its path."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import rltrain
from rltrain.reward.caught import Caught


def is_user_spec(name: str) -> bool:
    """Whether ``name`` is a ``path/to/file.py:function`` rather than a registered name."""
    return ".py:" in name


def source_digest(name: str) -> str:
    """A text that is equal for equal code: ``sha256:...`` for ``path/to/file.py:function``, ``rltrain 0.1.0``
    for a registered name.

    The digest covers the file and the modules in its folder that it imports, directly or indirectly, but no
    installed package. A relative path starts at the current folder. Raises ValueError if the file cannot be
    read.
    """
    if not is_user_spec(name):
        return f"rltrain {rltrain.__version__}"
    file = Path(name.rpartition(":")[0]).expanduser().resolve()
    digest = hashlib.sha256()
    for path in source_files(file):
        content = _read_file(path)
        digest.update(
            f"{path.relative_to(file.parent).as_posix()} {len(content)}\n".encode("utf-8", "surrogateescape")
        )
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def import_file(file: Path, module_name: str) -> ModuleType:
    """The file as a module; its folder becomes importable, as with ``python file.py``.

    Raises ValueError with the file's own error if it does not import.
    """
    source = importlib.util.spec_from_file_location(module_name, file)
    if source is None or source.loader is None:
        raise ValueError(f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(source)
    sys.modules[module_name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    with _without_bytecode(), Caught() as caught:
        source.loader.exec_module(module)
    if caught.error is not None:
        raise ValueError(f"{file} does not import: {caught}") from caught.error
    return module


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    """Imports write no ``__pycache__`` into the user's folder."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def source_files(file: Path) -> list[Path]:
    """``file`` and every module in or below its folder that it imports, in the order of the imports."""
    files = [file]
    for path in files:  # the list grows during the loop
        files += [
            neighbor for neighbor in dict.fromkeys(_neighbors(path, file.parent)) if neighbor not in files
        ]
    return files


def _neighbors(path: Path, folder: Path) -> Iterator[Path]:
    """Files of the modules that ``path`` imports from ``folder``; other modules are installed or missing."""
    try:
        tree = ast.parse(_read_file(path))
    except (SyntaxError, ValueError):  # loading the file reports the error
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
    """The files that importing ``dotted`` from ``folder`` executes: each package's ``__init__.py`` and the
    module."""
    parent = folder
    for part in filter(None, dotted.split(".")):
        parent = parent / part
        candidates = (parent / "__init__.py", parent.with_name(f"{part}.py"))
        yield from (candidate for candidate in candidates if candidate.is_file())


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
