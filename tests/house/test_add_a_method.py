"""docs/add_a_method.md, followed to the letter in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.slow  # starts pytest in the copy
KNOWN_ANSWERS = "tests/known_answers/loops.json"


def block(language: str, marker: str) -> str:
    """The page's block of this language that contains ``marker``."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    matches = [body for body in blocks if marker in body]
    assert len(matches) == 1, f"{len(matches)} blocks of {language} hold {marker!r}"
    return matches[0]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository after steps 1 and 3 of the page: the function and the recipe."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("rltrain", "reward", "recipes", "scripts", "docs", "tests", "requirements"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for path in [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "CITATION.cff", ROOT / "LICENSE"]:
        shutil.copy(path, tree)
    shutil.copytree(ROOT / "scripts" / "results", tree / "scripts" / "results")

    (tree / "rltrain/advantage/pass_at_k.py").write_text(block("python", "def pass_at_k"))
    registry = tree / "rltrain/advantage/__init__.py"
    line = block("text", "rltrain.advantage.pass_at_k")
    last = '        "rltrain.advantage.none",\n'
    assert last in registry.read_text()
    registry.write_text(registry.read_text().replace(last, last + line))
    (tree / "recipes/policy/pass_at_k.yaml").write_text(block("yaml", "pass_at_k"))
    return tree


def run_in(tree: Path, command: str) -> subprocess.CompletedProcess[str]:
    python = f"{sys.executable} -P" if sys.flags.safe_path else sys.executable
    command = re.sub(r"^rltrain ", f"{python} -m rltrain ", command)
    command = re.sub(r"^python ", f"{python} ", command)
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", command], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def pytest_command() -> str:
    (command,) = [line for line in block("bash", "methods_table").splitlines() if "pytest" in line]
    return command


def test_a_method_without_a_known_answer_is_found(tree: Path):
    done = run_in(tree, "python -m pytest -q -p no:cacheprovider tests/house/test_methods.py -k pass_at_k")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "add a case for pass_at_k to a file of tests/known_answers/" in done.stdout
    assert "1 failed, 3 passed" in done.stdout  # a source, what it does, a formula; no known answer


def test_the_page_adds_a_method_and_the_named_tests_find_it(tree: Path):
    answers = tree / KNOWN_ANSWERS
    case = block("json", "pass_at_k").strip()
    text = answers.read_text(encoding="utf-8")
    answers.write_text(text.replace('"cases": [\n', f'"cases": [\n    {case},\n', 1), encoding="utf-8")
    for command in block("bash", "methods_table").splitlines():
        if "pytest" not in command:
            done = run_in(tree, command)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert "`pass_at_k` | 2503.19595 | Pass@k: " in (tree / "docs/methods.md").read_text(encoding="utf-8")

    done = run_in(tree, f"{pytest_command()} -p no:cacheprovider -rA -k 'pass_at_k or generated'")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "tests/house/test_methods.py::test_every_method_has_a_known_answer[advantage-pass_at_k]",
        "tests/house/test_docs.py::test_generated_pages_are_up_to_date[methods_table.py]",
        "tests/test_known_answers.py::test_the_known_answer_comes_out_in_float64[loops/pass_at_k.best]",
    ):
        assert f"PASSED {name}\n" in done.stdout
    assert re.search(r"PASSED \S*test_advantages\.py::\S*\[pass_at_k", done.stdout)
