"""The recipes and profiles that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from rltrain.chat_template import is_template_file
from rltrain.config.yaml12 import read
from rltrain.errors import RecipeError, UserError
from rltrain.registry import suggestion

__all__ = [
    "RECIPES_FOLDER",
    "copy_recipe",
    "find_recipe",
    "find_recipes",
    "is_recipe_name",
    "recipe_file",
]

RECIPES_FOLDER = (Path(__file__).parents[1] / "recipes").resolve()  # in a checkout that is a link
_FOLDERS = ("policy", "preference", "process_reward", "supervised")
_BASES = "base"


def is_recipe_name(text: str) -> bool:
    """Whether ``text`` is a name such as ``dapo`` and no path of a file."""
    return not text.endswith((".yaml", ".yml")) and "/" not in text


def recipe_file(recipe: str | Path) -> Path:
    """The file of ``recipe``, a path or the name of a shipped recipe; a file in the current folder precedes.

    Raises RecipeError if it is neither.
    """
    path = Path(recipe)
    return find_recipe(str(recipe)) if is_recipe_name(str(recipe)) and not path.is_file() else path


def find_recipe(name: str, *, bases: bool = False) -> Path:
    """The file of the shipped recipe ``name``, or with ``bases`` also of what shipped recipes extend.

    Raises RecipeError, suggesting a similar name, if there is none.
    """
    folders = (*_FOLDERS, _BASES) if bases else _FOLDERS
    recipes = {path.stem: path for folder in folders for path in (RECIPES_FOLDER / folder).glob("*.yaml")}
    if name not in recipes:
        remedy = suggestion(name, recipes) or f"; there are no recipes in {RECIPES_FOLDER}"
        raise RecipeError(f"no shipped recipe is called {name!r}{remedy}; a path ends in .yaml")
    return recipes[name]


def find_recipes(word: str = "") -> list[tuple[str, str, str]]:
    """(name, folder, title with the paper) of every shipped recipe that has ``word`` in one of them, in any
    case.
    """
    rows: list[tuple[str, str, str]] = []
    for folder in _FOLDERS:
        for path in sorted((RECIPES_FOLDER / folder).glob("*.yaml")):
            about = read(path).data.get("about", {})
            paper = f" (arXiv:{about['arxiv']})" if about.get("arxiv") else ""
            row = (path.stem, folder, f"{about.get('title', '')}{paper}")
            if any(word.lower() in cell.lower() for cell in row):
                rows.append(row)
    return rows


def copy_recipe(name: str, target: Path) -> str:
    """Writes the shipped recipe ``name``, with its comments, to the file ``target``; returns its text.

    What it extends is named there, since the path is one between shipped files; a chat template's file is
    copied beside it. Raises RecipeError for an
    unknown name, UserError if ``target`` exists or cannot be written.
    """
    path = find_recipe(name)
    document = read(path).data
    extends = document.get("extends")
    text = path.read_text(encoding="utf-8")
    if extends is not None and not is_recipe_name(extends):
        text = text.replace(f"extends: {extends}", f"extends: {Path(extends).stem}", 1)
    template = str(document.get("data", {}).get("chat_template", "auto"))
    if is_template_file(template):
        text = text.replace(f"chat_template: {template}", f"chat_template: {Path(template).name}", 1)
    head = (
        f"# A copy of rltrain's recipe {path.parent.name}/{name}. docs/config.md lists every key,\n"
        f"# `rltrain plan {target}` prints what they come to; --profile NAME sets model, data and sizes.\n"
    )
    _write_new(target, head + text)
    if is_template_file(template):
        _write_new(target.with_name(Path(template).name), (path.parent / template).read_text("utf-8"))
    return head + text


def _write_new(target: Path, text: str) -> None:
    """Raises UserError if ``target`` has another text, or cannot be written."""
    try:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            with target.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError as error:
        raise UserError(f"{target} exists already; name another file with --out") from error
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; name another with --out") from error
