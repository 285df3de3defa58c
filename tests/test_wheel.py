"""The wheel, outside the tree: it trains by every way of starting, whatever else is called reward."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rltrain.config.load import load_recipe

ROOT = Path(__file__).parents[1]
PARTS = ("rltrain", "reward", "recipes", "pyproject.toml", "README.md", "LICENSE")
SHORT = ("train.steps=1", "rollout.prompts=4", "rollout.n=2", "eval.prompts=4", "reward.workers=1")
BROKEN = "raise SystemExit('the wrong reward was imported')\n"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]


def own_environment() -> dict[str, str]:
    """Without PYTHONPATH, by which pip would find the checkout and leave the wheel out."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a package is made from."""
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tree / part)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), "."]
    subprocess.run(build, cwd=tree, env=own_environment(), check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel, the tested packages, and another ``reward``."""
    environment = tmp_path_factory.mktemp("installed") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    install = ["install", "-q", "--no-deps", "--no-index", str(wheel)]
    command = [*PIP, "--python", str(environment / "bin" / "python"), *install]
    subprocess.run(command, env=own_environment(), check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    tested = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "tested.pth").write_text("".join(f"{path}\n" for path in sorted(tested)))
    (packages / "reward").mkdir()
    (packages / "reward" / "__init__.py").write_text(BROKEN)
    return environment / "bin" / "python"


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Run:
    """(program, *words) in a folder with a reward.py and a reward/; fails with what the program printed."""
    (tmp_path / "reward.py").write_text(BROKEN)
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "__init__.py").write_text(BROKEN)

    def start(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python.with_name(program)), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=own_environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return start


def test_a_source_distribution_holds_all_that_the_wheel_does(tree: Path, wheel: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-c", BUILD_SDIST, str(tmp_path)]
    subprocess.run(build, cwd=tree, check=True, capture_output=True)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        members = {member.name.partition("/")[2]: member.isreg() for member in archive if not member.isdir()}
    assert all(members.values())  # the links have become the files that they point to
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"rltrain/reward/score.py", "rltrain/recipes/policy/grpo.yaml"} <= packed
    assert packed | {"pyproject.toml", "README.md", "LICENSE"} <= set(members)


@pytest.mark.parametrize(
    "start",
    [
        ("rltrain",),
        ("python", "-m", "rltrain"),
        ("python", "-m", "accelerate.commands.accelerate_cli", "launch", "CONFIG", "-m", "rltrain"),
    ],
    ids=["rltrain", "python", "accelerate"],
)
def test_it_trains(start: tuple[str, ...], run: Run, python: Path, random_model: str, tmp_path: Path) -> None:
    (recipes,) = python.parents[1].glob("lib/python*/site-packages/rltrain/recipes")
    config = ("--config_file", str(recipes / "accelerate" / "ddp.yaml"), "--num_processes", "2")
    program, *words = start
    before = [option for word in words for option in (config if word == "CONFIG" else (word,))]
    settings = [word for key in (f"model.path={random_model}", *SHORT) for word in ("--set", key)]
    run(program, *before, "train", "grpo", "--profile", "tiny_cpu", "--run", "first", *settings)
    assert (tmp_path / "first" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "first" / "report.html").is_file()


def test_recipes_are_found_by_name_and_copied(run: Run, tmp_path: Path) -> None:
    assert "clip_cov" in run("rltrain", "recipes", "covariance").stdout
    run("rltrain", "init", "dapo")
    assert load_recipe(tmp_path / "dapo.yaml") == load_recipe("dapo")
    assert "dapo.yaml: ok" in run("rltrain", "validate", "dapo.yaml", "kl_cov").stdout


def test_it_makes_the_tiny_model(run: Run, tmp_path: Path) -> None:
    run("rltrain", "tiny-model", "--steps", "2")
    assert (tmp_path / ".cache" / "tiny-model" / "model.safetensors").is_file()
    assert "already made" in run("rltrain", "tiny-model", "--steps", "2").stdout
