"""Rules about the text of the project itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("rltrain", "reward", "recipes", "docs", "scripts", "tests")
SUFFIXES = {".py", ".yaml", ".yml", ".json", ".md", ".toml", ".sh", ".txt", ".cff"}
# a path that exists on one machine only; assembled so that this file does not match itself
SOMEBODYS_MACHINE = re.compile(r"(?<![\w.~}])/(?:" + "|".join(["work", "home", "Users"]) + r")/\w")

YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
RELATIVE = re.compile(r"(?<![\w./])(?:\.\./)+[\w.-]+(?:/[\w.-]+)*")


def texts() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(
        path
        for path in [*inside, *(path for path in ROOT.iterdir() if path.suffix in SUFFIXES)]
        if path.is_file()
    )


def modules() -> list[Path]:
    return sorted([*(ROOT / "rltrain").rglob("*.py"), *(ROOT / "reward").rglob("*.py")])


def test_nothing_in_the_package_prints():
    # output goes through report/ or typer.echo; the command line's errors on stderr are the one exception
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if not (
            path.name == "app.py"
            and any(ast.unparse(keyword) == "file=sys.stderr" for keyword in node.keywords)
        )
    ]
    assert not places


def test_nobody_catches_everything():
    # a broad except hides the errors that matter: name what is expected. Cleaning up and raising on is no
    # catch; graders are users' code (whatever they raise costs one completion), trackers third parties'
    # (switched off, loudly)
    broad, others_code = {"Exception", "BaseException"}, {"reward", "rltrain/report/sinks.py"}
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        if not others_code & {path.relative_to(ROOT).parts[0], path.relative_to(ROOT).as_posix()}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in broad))
        if not isinstance(node.body[-1], ast.Raise)
    ]
    assert not places


def test_the_machine_path_rule_sees_one():
    assert SOMEBODYS_MACHINE.search("open('/ho" + "me/ann/model')")
    assert not SOMEBODYS_MACHINE.search("https://example.org/home/page") and not SOMEBODYS_MACHINE.search(
        "runs/work/x"
    )


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_speaks_of_somebodys_machine(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if SOMEBODYS_MACHINE.search(line)
    ]


def paths_out_of_the_tree(path: Path, text: str) -> list[str]:
    """Relative paths with ``..`` that lead, from the file's folder, to nothing in the repository."""
    targets = [match.group().rstrip(".") for match in RELATIVE.finditer(text)]
    resolved = [(target, (path.parent / target).resolve()) for target in targets]
    return [target for target, end in resolved if not (end.is_relative_to(ROOT) and end.exists())]


def test_the_rule_on_relative_paths_sees_data_outside_and_links_inside():
    recipe, page = ROOT / "recipes/policy/grpo.yaml", ROOT / "docs/studies/README.md"
    assert paths_out_of_the_tree(recipe, "train: ../beside/data/train.jsonl") == [
        "../beside/data/train.jsonl"
    ]
    assert paths_out_of_the_tree(page, "--data ../data/gsm8k/test.jsonl") == ["../data/gsm8k/test.jsonl"]
    assert paths_out_of_the_tree(ROOT / "README.md", "see ../beside.") == ["../beside"]
    assert not paths_out_of_the_tree(recipe, "extends: ../base/online.yaml")
    assert not paths_out_of_the_tree(page, "[lessons](../lessons.md), step 1...2, a/../b")


@pytest.mark.parametrize(
    "path",
    [path for path in texts() if path.relative_to(ROOT).parts[0] not in ("rltrain", "reward", "tests")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_recipe_page_or_script_names_a_path_out_of_the_tree(path: Path):
    # users have the repository and nothing beside it: data comes by Hub name or from scripts/get_data.py
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":  # a page's YAML stands for a recipe, whose paths begin at its own folder
        for recipe in YAML_BLOCK.findall(text):
            assert not paths_out_of_the_tree(ROOT / "recipes" / "policy" / path.name, recipe)
        text = YAML_BLOCK.sub("", text)
    assert not paths_out_of_the_tree(path, text)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_ascii(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), next(line for line in text.splitlines() if not line.isascii())


def test_every_function_fits_a_screen():
    # 60 lines, docstring included: past that a noun is missing
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in [*modules(), *(ROOT / "scripts").glob("*.py"), *(ROOT / "examples").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 60
    }
    assert not long
