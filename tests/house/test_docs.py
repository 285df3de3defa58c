"""README and docs: short, current, and nothing in them leads nowhere."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from rltrain.advantage import ADVANTAGES
from rltrain.cli.app import app
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.rules.registries import REWARDS
from rltrain.control import TOKEN_CONTROLS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.reward.resolve import RewardCall, resolve
from rltrain.reward.score import RewardInputs
from support.warm import run_program

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "recipes" / "README.md"])
README = ROOT / "README.md"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:.*-m )?rltrain +([a-z][\w-]*)([^\n#]*)", re.MULTILINE)
# words of a command that name a file of the repository; outputs and models of runs are elsewhere
FILE = re.compile(r"(?<![\w./-])(?:scripts|recipes|tests|rltrain|docs|examples|requirements)/[\w./*-]{2,}")
# what add_a_method.md tells its reader to make
MADE_BY_THE_READER = {"recipes/policy/pass_at_k.yaml", "rltrain/advantage/pass_at_k.py"}
# pages about the past
HISTORY = {ROOT / "CHANGELOG.md", ROOT / "docs" / "lessons.md"}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of the page that lead to no file, or to no heading of it."""
    return [
        target
        for target in LINK.findall(text)
        if not re.match(r"[a-z]+:", target)
        if not is_reachable(page, target)
    ]


def is_reachable(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not (file.is_relative_to(ROOT) and file.exists()):
        return False
    return not anchor or anchor in anchors(file.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_files(text: str) -> list[str]:
    """Files that a text names and the repository does not have."""
    names = {name.rstrip(".") for name in FILE.findall(text)}
    return sorted(name for name in names - MADE_BY_THE_READER if not list(ROOT.glob(name.rstrip("/"))))


def test_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def readme_code(marker: str) -> str:
    """The one block of Python in the README that holds ``marker``."""
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    (code,) = [body for language, body in blocks if language == "python" and marker in body]
    return code


@pytest.mark.slow
def test_the_training_in_readme_takes_eight_lines_of_python_that_run(random_model: str, tmp_path: Path):
    code = readme_code("rltrain.train")
    assert len(code.splitlines()) <= 8
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "tiny-model").symlink_to(random_model)
    code = code.replace("train.steps=200", "train.steps=1")
    (tmp_path / "eight_lines.py").write_text(code)
    done = run_program(["eight_lines.py"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"pass@1 [01]\.\d\d", done.stdout.splitlines()[-1])


def test_the_method_in_readme_runs_and_prints_what_it_says():
    code = readme_code("def max_rl")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == code.rpartition("  # ")[2].strip()


def test_the_first_block_of_readme_is_the_quickstart_and_both_commands_are_there():
    blocks = [body for _, body in BLOCK.findall(README.read_text(encoding="utf-8"))]
    assert blocks[0].startswith("bash scripts/quickstart.sh")
    assert any("bash scripts/check full" in body for body in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path):
    assert not broken_links(page, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_file_that_a_page_names_exists(page: Path):
    assert not missing_files(page.read_text(encoding="utf-8"))


def test_the_rules_on_links_and_files_see_what_is_missing():
    text = (
        "[a](docs/nowhere.md) [b](docs/README.md#nothing) [c](docs/README.md#documentation) [d](https://x.y)"
    )
    assert broken_links(README, text) == ["docs/nowhere.md", "docs/README.md#nothing"]
    text = "rltrain train recipes/policy/nothing.yaml recipes/policy/*.yaml; python scripts/golden.py check."
    assert missing_files(text) == ["recipes/policy/nothing.yaml"]


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / target).resolve() for target in LINK.findall(index.read_text(encoding="utf-8"))}
    assert {page for page in (ROOT / "docs").glob("*.md") if page != index} <= listed


def test_every_message_in_troubleshooting_is_a_message_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Installation")[0]
    cells = re.findall(
        r"^\| `(.+?)`(?: \([^|]*\)| in [^|]*| near [^|]*| above [^|]*)? \|", page, re.MULTILINE
    )
    headings = page.count("| message |")
    assert len(cells) == len(re.findall(r"^\| ", page, re.MULTILINE)) - headings > 25
    sources = [*(ROOT / "rltrain").rglob("*.py"), *(ROOT / "reward").rglob("*.py")]
    texts = "\n".join(
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert not [cell for cell in cells if cell.replace("\\|", "|").rstrip("*") not in texts]


@pytest.mark.parametrize("name", ["accuracy", "compute_score"])
def test_both_rewards_in_the_page_on_other_libraries_are_taken(name: str, tmp_path: Path):
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    (code,) = [body for language, body in BLOCK.findall(page) if language == "python"]
    (tmp_path / "of_another_library.py").write_text(code)  # a module's name stays taken in this process
    grader = resolve(RewardCall(f"{tmp_path / 'of_another_library.py'}:{name}", 1.0, {}))
    scores = grader(RewardInputs("p", ("it is 7", "no"), (3, 1), ("stop", "stop"), {"answer": "7"}))
    assert [score.value for score in scores] == [1.0, 0.0]


def test_the_page_on_other_libraries_names_keys_of_recipes():
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    keys = re.findall(r"^\| `((?:model|data|rollout|learner|train|checkpoint)\.[\w.]+)", page, re.MULTILINE)
    recipe = load_recipe("grpo").model_dump(mode="json")
    for key in keys:
        value = recipe
        for part in key.split("."):
            assert part in value, key
            value = value[part]
    assert len(keys) > 12

    registries = {"advantage": ADVANTAGES, "loss.policy": POLICY_LOSSES, "loss.aggregate": AGGREGATES}
    registries |= {"control": TOKEN_CONTROLS, "loss.terms": LOSS_TERMS}
    cells = re.findall(rf"^\| `({'|'.join(registries)}): (.*?)` \|", page, re.MULTILINE)
    for key, cell in cells:
        for value in cell.split("`, `"):
            refs = yaml.safe_load(value)
            for ref in refs if isinstance(refs, list) else [refs]:
                name, *hp = [ref] if isinstance(ref, str) else [ref.pop("name"), *ref]
                known = {*registries[key].spec(name).hyperparameters, "coefficient"}
                assert set(hp) <= known, (key, value)
    assert len(cells) > 8


def test_the_page_on_rewards_names_every_reward():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert not [name for name in REWARDS.names() if f"`{name}`" not in page]


def test_the_methods_in_the_page_on_recipes_make_a_valid_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = [body for language, body in BLOCK.findall(page) if language == "yaml"]
    overrides = [f"{key}={json.dumps(value)}" for key, value in yaml.safe_load(block).items()]
    check(load_recipe(ROOT / "recipes" / "policy" / "grpo.yaml", profile="tiny_cpu", overrides=overrides))


def unknown_words(text: str) -> list[str]:
    """Commands and options of rltrain in a text's code that the command line does not have."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    unknown: list[str] = []
    for name, rest in COMMAND.findall(code_lines(text)):
        if name not in group.commands:
            unknown.append(name)
            continue
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        unknown += sorted(set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest)) - known)
    return unknown


def code_lines(text: str) -> str:
    """The lines of bash blocks, continuations joined, and inline code, one piece per line."""
    blocks = "\n".join(
        body.replace("\\\n", " ") for language, body in BLOCK.findall(text) if language == "bash"
    )
    inline = "\n".join(re.findall(r"`(rltrain [^`\n]+)`", BLOCK.sub("", text)))
    return f"{blocks}\n{inline}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_command_and_option_of_a_page_exists(page: Path):
    assert not unknown_words(page.read_text(encoding="utf-8"))


def test_the_rule_on_commands_sees_unknown_ones():
    block = "```bash\nrltrain train R --profil x  # --what\nrltrain plan R --engine vllm\n```\n"
    text = f"Run `rltrain trian R` or\n{block}"
    assert unknown_words(text) == ["--profil", "trian"]


@pytest.mark.parametrize("script", ["methods_table.py", "reference_pages.py"])
def test_generated_pages_are_up_to_date(script: str):
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
