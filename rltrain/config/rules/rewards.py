"""Rules about a user's reward functions in a recipe; those of rltrain's have their rules beside them.

Imports no torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rltrain.config.schema import RewardRef
from rltrain.config.user_code import find_definition, unknown_keywords
from rltrain.config.user_files import changed_code


def is_user_function(name: str) -> bool:
    """Whether a reward is named as ``path/to/file.py:function``."""
    return ":" in name or name.endswith(".py")


def user_function_problems(ref: RewardRef) -> Iterator[str]:
    """Problems of ``path/to/file.py:function``."""
    name = ref.name
    file, colon, function = name.rpartition(":")
    if not colon or not file or not function:
        yield f"{name!r} must name a file and a function in it, as in path/to/file.py:function"
        return
    try:
        node = find_definition(file, function, ast.FunctionDef, ast.AsyncFunctionDef)
    except ValueError as error:
        yield str(error)
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from unknown_keywords(node, ref.hp, name)
    problem = changed_code(name, ref.sha256)
    if problem is not None:
        yield problem
