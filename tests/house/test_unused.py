"""Every function at a module's top level is used somewhere: what nothing calls proves nothing."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("rltrain", "reward", "scripts", "examples", "tests", "docs")
RUN_BY_NAME = ("test_", "pytest_")


def test_every_function_is_named_where_it_is_used() -> None:
    files = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    pages = [path for folder in ("docs", "recipes") for path in (ROOT / folder).rglob("*.*")]
    readable = [*files, *(path for path in pages if path.suffix in (".md", ".yaml"))]
    words = Counter(word for path in readable for word in re.findall(r"\w+", path.read_text()))
    unused = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.decorator_list  # registered or a fixture
        and not node.name.startswith(RUN_BY_NAME)
        and words[node.name] == 1
    ]
    assert len(words) > 1000 and unused == []
