"""The command line, as a user meets it: in a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rltrain import __version__
from rltrain.cli.app import MODELS, RECIPES, TRAINING, app
from rltrain.train.saving import STOPPED
from rltrain.watchdog import EXPIRED

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "transformers", "datasets", "accelerate", "numpy", "math_verify")


def rltrain(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    here = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment}
    return subprocess.run(
        [sys.executable, "-m", "rltrain", *arguments],
        cwd=cwd,
        env=here,
        capture_output=True,
        text=True,
        timeout=120,
    )


def cpu_seconds(code: str) -> float:
    """What a fresh interpreter works for: its wall-clock on an idle machine, and nearly that on a
    busy one.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments", [["--help"], ["validate", "recipes"], ["plan", "recipes/policy/grpo.yaml"]]
)
def test_what_needs_no_model_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom rltrain.cli.app import main\n"
        f"sys.argv = ['rltrain', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code in (0, None), done.code\n"
        f"print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "recipes/policy/grpo.yaml"]])
def test_the_command_line_answers_at_once(arguments: list[str]) -> None:
    # Half a second; on a slow machine no more than five times what typer, pydantic and yaml take to import
    # there (0.1 s here).
    ours = (
        f"import sys, runpy; sys.argv = ['rltrain', *{arguments!r}]\nrunpy.run_module('rltrain', "
        "run_name='__main__')"
    )
    allowed = max(0.5, 5 * cpu_seconds("import typer, pydantic, yaml"))
    assert min(cpu_seconds(ours) for _ in range(3)) < allowed


def test_every_recipe_validates_with_and_without_the_tiny_profile() -> None:
    for extra in ([], ["--profile", "tiny_cpu"]):
        result = rltrain("validate", *map(str, sorted((ROOT / "recipes").rglob("*.yaml"))), *extra)
        assert result.returncode == 0, result.stdout + result.stderr
        lines = result.stdout.splitlines()
        assert any(line.endswith("policy/dapo.yaml: ok") for line in lines)
        assert any(line.endswith("base/online.yaml: ok, a base") for line in lines)
        assert any(line.endswith("profiles/tiny_cpu.yaml: ok, a profile") for line in lines)
        assert any(line.endswith("accelerate/zero3.yaml: skipped, an accelerate config") for line in lines)


def test_a_pattern_that_the_shell_left_alone_is_expanded() -> None:
    assert "recipes/policy/grpo.yaml: ok" in rltrain("validate", "recipes/**/grpo.yaml").stdout
    nothing = rltrain("validate", "recipes/**/nothing*.yaml")
    assert (nothing.returncode, nothing.stderr) == (
        2,
        "error: recipes/**/nothing*.yaml: no YAML file matches\n",
    )


def test_validate_goes_on_after_a_failure_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("sead: 1\n")
    result = rltrain("validate", str(tmp_path / "bad.yaml"), "recipes/policy/grpo.yaml")
    assert result.returncode == 1
    assert f"{tmp_path}/bad.yaml: failed" in result.stdout
    assert f"  error: {tmp_path}/bad.yaml:1: unknown key sead; did you mean 'seed'?" in result.stdout
    assert "recipes/policy/grpo.yaml: ok" in result.stdout
    assert result.stderr == "1 of 2 failed\n"


@pytest.mark.parametrize("command", [["train"], ["plan"], ["eval", "model", "--recipe"]])
def test_a_users_mistake_is_one_line_and_exit_code_2(command: list[str]) -> None:
    result = rltrain(*command, "recipes/policy/grpoo.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: recipes/policy/grpoo.yaml: no such file; did you mean 'grpo.yaml'?\n"


def test_several_mistakes_are_one_line_each() -> None:
    result = rltrain(
        "train",
        "recipes/policy/grpo.yaml",
        "--set",
        "rollout.n=1",
        "--set",
        "eval.n=2",
        "--engine",
        "vllm",
        "--seed",
        "3",
    )
    assert result.returncode == 2
    assert [line[:7] for line in result.stderr.splitlines()] == ["error: "] * 2


def test_shorthands_are_overrides() -> None:
    result = rltrain("train", "recipes/policy/grpo.yaml", "--engine", "vlm", "--seed", "many")
    assert result.returncode == 2
    assert "--seed" in result.stderr  # typer's own refusal: not an integer
    result = rltrain("train", "recipes/policy/grpo.yaml", "--engine", "vlm")
    assert result.stderr.startswith("error: --set rollout.engine=vlm: rollout.engine: got 'vlm'")


def test_the_traceback_is_there_for_those_who_ask() -> None:
    result = rltrain("plan", "nothing.yaml", RLTRAIN_TRACEBACK="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RecipeError: nothing.yaml: no such file" in result.stderr


def test_plan_prints_numbers_and_warnings() -> None:
    result = rltrain("plan", "recipes/policy/dapo.yaml", "--profile", "tiny_cpu")
    assert result.returncode == 0
    assert "rollout: completions per step" in result.stdout
    assert "warning: learner.updates 16 does not divide rollout.prompts 24" in result.stdout


def test_the_help_of_train_names_the_exit_code_of_a_run_that_was_stopped() -> None:
    result = rltrain("train", "--help")
    assert f"Exit code {STOPPED}: stopped by SIGTERM" in " ".join(result.stdout.split())
    assert STOPPED not in {0, 1, 2, EXPIRED}
    assert STOPPED < 126  # from 126 on a shell means a failed start or a signal


def test_help_groups_commands_and_options_and_takes_the_terminals_width() -> None:
    shown = rltrain("--help", COLUMNS="100").stdout
    titles = ("Train and compare", "Recipes", "Models", "Examples:")
    assert [title in shown for title in titles] == [True] * len(titles)
    assert "rltrain train grpo --profile tiny_cpu" in shown
    of_train = {width: rltrain("train", "--help", COLUMNS=str(width)).stdout for width in (60, 100, 140)}
    for width, text in of_train.items():
        assert max(map(len, text.splitlines())) == width
        assert "Options of the recipe" in text and "Options of the run" in text


def test_every_command_is_in_a_group_and_has_an_example() -> None:
    for command in app.registered_commands:
        assert command.rich_help_panel in (TRAINING, RECIPES, MODELS)
        assert isinstance(command.epilog, str) and "rltrain " in command.epilog


def test_the_version() -> None:
    result = rltrain("--version")
    assert (result.returncode, result.stdout) == (0, f"rltrain {__version__}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tra"], ["train"]),
        (["train", "da"], ["dapo"]),
        (["train", "dapo", "--profile", "tiny"], ["tiny_cpu"]),
        (["train", "--res"], ["--resume"]),
    ],
)
def test_a_shell_completes_commands_recipes_profiles_and_options(
    words: list[str], expected: list[str]
) -> None:
    code = "import sys; sys.argv = ['rltrain']; from rltrain.cli.app import main; main()"
    environment = {
        "_RLTRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["rltrain", *words]),
        "COMP_CWORD": str(len(words)),
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert set(expected) <= set(result.stdout.split()), result.stderr
    assert all(word.startswith(words[-1]) for word in result.stdout.split())


@pytest.mark.parametrize(("used", "lines"), [("false", 0), ("true", 1)])
def test_deepspeeds_warning_shows_only_where_deepspeed_is_used(used: str, lines: int) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    code = (
        "import sys; from rltrain.cli import app\n"
        "app.app = lambda **_: __import__('deepspeed')\n"
        "sys.argv = ['rltrain']\n"
        "try:\n    app.main()\nexcept SystemExit:\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_DEEPSPEED": used}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert said.count("Setting accelerator to CPU") == lines, said
