"""Gradients are made in one place; learners share an object that they hold, and functions."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rltrain"


def nodes() -> list[tuple[str, ast.AST]]:
    """Every syntax node of the package, with its file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return [(file, node) for file, text in texts.items() for node in ast.walk(ast.parse(text))]


def test_one_line_outside_the_backends_calls_backward() -> None:
    functions = [(file, ast.unparse(node.func)) for file, node in nodes() if isinstance(node, ast.Call)]
    calls = Counter(file for file, function in functions if function.endswith(".backward"))
    assert calls.pop("learner/backend.py") == 2  # what each of the two does with the loss
    assert calls.pop("build/tiny_model.py") == 1  # the supervised warm start of a model, before any run
    assert calls == {"learner/update_step.py": 1}


def test_no_learner_inherits_from_a_learner() -> None:
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for file, node in nodes()
        if file.startswith("learner/") and isinstance(node, ast.ClassDef) and node.name.endswith("Learner")
    }
    assert set(bases) == {"PairLearner", "PolicyLearner", "PreferenceLearner", "ProcessRewardLearner"}
    assert all(names == ["ModelOwner"] for names in bases.values())
