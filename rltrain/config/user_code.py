"""Checks a user's function or class, ``path/to/file.py:name`` in a recipe, without importing its file."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from rltrain.registry import suggestion

Function = ast.FunctionDef | ast.AsyncFunctionDef
_NOUNS = {ast.FunctionDef: "function", ast.ClassDef: "class"}


def find_definition(file: str, name: str, *kinds: type[ast.stmt]) -> ast.stmt:
    """The top-level statement of ``file`` that defines ``name``: a definition of one of ``kinds``, an import
    or an assignment.

    Raises ValueError, suggesting a similar name, if there is none. Messages mention the first of ``kinds``.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file}{_hint_current_folder(path)}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; correct its permissions") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # the parser reports nesting beyond its stack as MemoryError
        raise ValueError(f"{file} is not valid Python: {error or 'nested too deeply'}") from error

    defined = {
        node.name: node
        for node in tree.body
        if isinstance(node, kinds) and isinstance(node, Function | ast.ClassDef)
    }
    assigned = {name: node for node in tree.body for name in _assigned_names(node)}

    if name in assigned and name not in defined:
        return assigned[name]
    if name not in defined:
        noun = _NOUNS[kinds[0]]
        raise ValueError(
            f"{file} defines no {noun} {name!r}{suggestion(name, defined) or '; it defines none'}"
        )
    return defined[name]


def _hint_current_folder(path: Path) -> str:
    """A hint if the current folder has a file of that name; paths in a recipe do not start there."""
    candidate = Path.cwd() / path.name
    if not candidate.is_file() or candidate == path:
        return ""
    return (
        f"; there is {candidate}, but a path in a recipe starts from the recipe's folder: write it relative "
        "to that folder or absolute, or use --set"
    )


def _assigned_names(node: ast.stmt) -> Iterator[str]:
    """Names that an import or an assignment defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def unknown_keywords(function: Function, keys: Iterable[str], owner: str) -> Iterator[str]:
    """A problem for each of ``keys`` that ``function`` does not accept. owner: its name for the user."""
    if function.args.kwarg is not None:
        return
    keywords = [item.arg for item in function.args.kwonlyargs]
    for key in keys:
        if key not in keywords:
            yield (
                f"{owner} has no keyword-only argument {key!r}{suggestion(key, keywords) or '; it has none'}"
            )
