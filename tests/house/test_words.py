"""Names are the field's words: a function is a verb with its object, a variable a noun.

No bare participle, preposition or adverb names a function; no pronoun
or adjective stands for a variable where a noun exists; words that only this project used stay out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("rltrain", "reward", "scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

VARIABLES = frozenset(
    {
        "alone",
        "at",
        "bare",
        "found",
        "given",
        "like",
        "mine",
        "most",
        "one",
        "ones",
        "own",
        "same",
        "seen",
        "theirs",
        "wanted",
        "whole",
    }
)
PREPOSITIONS = frozenset(
    {
        "about",
        "after",
        "among",
        "around",
        "at",
        "before",
        "below",
        "beside",
        "between",
        "by",
        "during",
        "for",
        "in",
        "of",
        "on",
        "over",
        "through",
        "under",
        "until",
        "upon",
        "within",
    }
)
ADVERBS = frozenset(
    {"afresh", "again", "anew", "elsewhere", "exactly", "never", "now", "nearby", "once", "there", "thus"}
)
PARTICIPLES = frozenset(
    {
        "begun",
        "bound",
        "built",
        "chosen",
        "cut",
        "drawn",
        "found",
        "given",
        "gone",
        "held",
        "kept",
        "laid",
        "left",
        "lost",
        "made",
        "read",
        "said",
        "seen",
        "shown",
        "spelt",
        "spent",
        "taken",
        "told",
        "won",
        "written",
    }
)
# Keys of recipes: renaming one changes what users write.
RECIPE_KEYS = {"rltrain/config/schema.py": {"given"}, "rltrain/control/entropy.py": {"most"}}
# Words that are verbs or nouns as well, terms of the field, or names that an interface fixes.
FUNCTIONS_ALLOWED = frozenset(
    {
        "bound",  # a bound is a limit
        "cut",  # to cut
        "read",  # to read
        "paced",  # a method's name
        "embed",
        "feed",
        "need",
        "seed",
        "speed",
        "shed",
        "on_step_end",  # transformers' callback
        "on_train_begin",
    }
)
WORDS = {
    r"\bCourse\b": "TrainingRun",
    r"\bMaterials\b": "RunInputs",
    r"\bCarried\b": "TrainingState",
    r"\bEndings\b": "StopTokens",
    r"\bJudgeMeans\b": "JudgeContext",
    r"\bARM_[A-Z]+\b": "SOURCE_*",
    r"\barms\b": "sources of samples",
    r"\blogits wall\b": "full-vocabulary logits",
    r"\blast words\b": "status",
    r"\bwhoever\b": "a noun",
    r"\blend(s|ing)?\b": "load temporarily",
}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def is_private_dialect(name: str) -> bool:
    """Whether a function's name is a bare participle or adverb, or begins with a preposition."""
    words = name.strip("_").split("_")
    if name.startswith("__") or name.strip("_") in FUNCTIONS_ALLOWED:
        return False
    if words[0] in PREPOSITIONS | ADVERBS:
        return True
    return len(words) == 1 and (words[0] in PARTICIPLES or re.fullmatch(r"[a-z]{2,}ed", words[0]) is not None)


def bound_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every variable and parameter, with the line that binds it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_is_named_by_a_verb_or_a_noun(path: Path) -> None:
    tree = ast.parse(path.read_text())
    wrong = [f"{node.lineno}: {node.name}" for node in functions(tree) if is_private_dialect(node.name)]
    assert not wrong, f"{path.relative_to(ROOT)}: name these by a verb with its object, or a noun: {wrong}"


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_variable_is_named_by_a_noun(path: Path) -> None:
    tree = ast.parse(path.read_text())
    refused = VARIABLES - RECIPE_KEYS.get(str(path.relative_to(ROOT)), set())
    wrong = [f"{line}: {name}" for name, line in bound_names(tree) if name.strip("_") in refused]
    assert not wrong, f"{path.relative_to(ROOT)}: say what these are: {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_assignment_has_a_line_of_its_own(path: Path) -> None:
    wrong = [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign) and is_parallel(node)
    ]
    assert not wrong, f"{path.relative_to(ROOT)}: write one assignment a line: {wrong}"


def is_parallel(node: ast.Assign) -> bool:
    """Whether the statement assigns several unrelated values; a swap reads what it assigns."""
    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return False
    read = {ast.unparse(part) for part in ast.walk(node.value) if isinstance(part, ast.Name | ast.Attribute)}
    return read.isdisjoint(ast.unparse(part) for part in target.elts)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_only_this_project_used_stay_out(path: Path) -> None:
    if path == Path(__file__):
        return
    text = path.read_text()
    wrong = [
        f"{text[: match.start()].count(chr(10)) + 1}: {match.group()} (say {instead})"
        for word, instead in WORDS.items()
        for match in re.finditer(word, text)
    ]
    assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"


@pytest.mark.parametrize("name", ["of", "_tried", "before_the_end", "_given", "elsewhere", "by_prompt"])
def test_the_rule_knows_what_to_refuse(name: str) -> None:
    assert is_private_dialect(name)


@pytest.mark.parametrize("name", ["to_checkpoint", "from_hex", "with_metrics", "read", "masked_mean", "seed"])
def test_the_rule_knows_what_to_allow(name: str) -> None:
    assert not is_private_dialect(name)
