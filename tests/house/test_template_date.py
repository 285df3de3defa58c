"""No prompt is rendered by the clock of the moment: a run that goes on tomorrow reads the same texts."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def unfrozen(text: str) -> list[int]:
    """Lines of calls of ``apply_chat_template`` without ``**frozen_clock(...)``."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    templates = [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "apply_chat_template"
    ]
    return [
        call.lineno
        for call in templates
        if not any(ast.unparse(word).startswith("**frozen_clock(") for word in call.keywords)
    ]


def test_the_rule_sees_a_template_that_reads_the_clock() -> None:
    assert unfrozen("tokenizer.apply_chat_template(messages, tokenize=False)")
    assert not unfrozen("tokenizer.apply_chat_template(messages, **frozen_clock(date))")


def test_every_chat_template_is_rendered_as_of_the_runs_date() -> None:
    templates = {
        str(path.relative_to(ROOT)): unfrozen(path.read_text(encoding="utf-8"))
        for path in (ROOT / "rltrain").rglob("*.py")
    }
    assert not {path: lines for path, lines in templates.items() if lines}
