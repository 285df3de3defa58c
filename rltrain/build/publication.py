"""What a push of a run to the Hub consists of: a model folder, and a card with what the run measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rltrain.analysis.comparison import Comparison, figure
from rltrain.analysis.curves import Curves, Line
from rltrain.build.context import RunContext
from rltrain.checkpoint.background_push import BackgroundPush
from rltrain.checkpoint.export import MANIFEST, file_hashes
from rltrain.checkpoint.hub import (
    Content,
    PushedFiles,
    Report,
    hide_progress_bars,
    open_repository,
    push_files,
)
from rltrain.checkpoint.model_card import Published, model_card
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import TRAINING, is_sharded
from rltrain.config.load import load_recipe
from rltrain.config.schema import AnyRecipe, Push
from rltrain.errors import UserError
from rltrain.json_text import parse_json
from rltrain.model_files import local_file, model_errors
from rltrain.train.loop import TrainingRun

__all__ = [
    "ModelOfRun",
    "Publication",
    "find_model",
    "publication_of",
    "push_model",
    "push_run",
    "results_until",
    "with_pushes",
]

CARD = "README.md"
CURVES = "curves.png"
RECIPE = "recipe.resolved.yaml"
ADAPTER = "adapter_config.json"  # peft's; a folder that has it is an adapter of the recipe's model


@dataclass(frozen=True)
class ModelOfRun:
    """A model folder. run: that wrote it, after ``step`` steps; None: it is by itself."""

    folder: Path
    run: RunFolder | None = None
    step: int = 0


@dataclass(frozen=True)
class Publication:
    """files: contents by path in the repository. title: of the commit."""

    files: Mapping[str, Content]
    title: str


def push_model(model: ModelOfRun, repository: str, *, private: bool, report: Report) -> PushedFiles:
    """Makes the repository and pushes ``model``, with a card where a run made it.

    Raises HubError, and UserError where a file is not what was written.
    """
    publication = publication_of(model, repository)
    open_repository(repository, private=private, report=report)
    return push_files(repository, publication.files, publication.title, report)


def with_pushes(run: TrainingRun, context: RunContext) -> TrainingRun:
    """``run``, whose checkpoints are pushed while it trains where its recipe says so; on rank 0."""
    settings = run.recipe.push
    reporter = run.reporter
    if settings is None or settings.every == 0 or not context.process.is_main:
        return run

    def push(model: Path, step: int) -> str:
        source = ModelOfRun(model, context.folder, step)
        return str(push_model(source, settings.repo, private=settings.private, report=reporter.message))

    pushes = BackgroundPush(settings.every, push, reporter.message, reporter.warn)
    return replace(run, writer=replace(run.writer, pushes=pushes))


def push_run(settings: Push, folder: RunFolder, report: Report) -> None:
    """Pushes the finished model of a run. Raises UserError with the command that pushes it later."""
    hide_progress_bars()
    try:
        pushed = push_model(find_model(folder.path), settings.repo, private=settings.private, report=report)
    except UserError as error:
        visibility = "--private" if settings.private else "--public"
        raise UserError(
            f"the run is finished and {folder.model} is whole, but not on the Hub: {error}\n"
            f"push it with: rltrain push {folder.path} {settings.repo} {visibility}"
        ) from error
    report(str(pushed))


def find_model(folder: Path) -> ModelOfRun:
    """The model that a push of ``folder`` is about: the finished model of a run or else its latest
    checkpoint; of a model folder, itself. Raises UserError where there is none.
    """
    run = RunFolder.from_path(folder)
    if not run.recipe.is_file():
        return _model_by_itself(run.path)
    if run.model.is_dir():
        return ModelOfRun(run.model, run, int(Curves.read(run.path).steps[-1]["step"]))
    checkpoints = [(step, path) for step, path in run.present_checkpoints() if (path / MANIFEST).is_file()]
    if not checkpoints:
        raise UserError(f"the run in {folder} has neither a finished model nor a checkpoint to push")
    step, checkpoint = checkpoints[-1]
    if is_sharded(checkpoint):
        raise UserError(
            f"{checkpoint} holds the ranks' parts and no model folder; write one with rltrain export "
            f"{folder} --out DIR, and push that"
        )
    return ModelOfRun(checkpoint, run, step)


def _model_by_itself(folder: Path) -> ModelOfRun:
    """A model folder, or one that a run wrote below its own folder."""
    if not ((folder / "config.json").is_file() or (folder / ADAPTER).is_file()):
        raise UserError(f"{folder} holds neither a run ({RECIPE}) nor a model (config.json)")
    run = RunFolder(folder.parent)
    if folder == run.model and run.recipe.is_file():
        return find_model(run.path)
    run = RunFolder(folder.parent.parent)
    if run.recipe.is_file():
        for step, path in run.present_checkpoints():
            if path == folder:
                return ModelOfRun(folder, run, step)
    return ModelOfRun(folder)


def publication_of(model: ModelOfRun, repository: str) -> Publication:
    """The files of ``model``, without a checkpoint's training state, compared with their hashes; of a run
    also a new card, the recipe and the curves.

    Raises UserError where a file is not what was written.
    """
    files = dict[str, Content](_model_files(model.folder))
    title = f"Push {model.folder.name}"
    if model.run is not None:
        files |= _facts_of_run(model.run, model.step, repository, is_adapter=ADAPTER in files)
        title = f"Push {model.run.path.name} after step {model.step}"
    hashes = {name: _sha256(content) for name, content in sorted(files.items())}
    files[MANIFEST] = (json.dumps(hashes, indent=2) + "\n").encode()
    return Publication(files, title)


def _facts_of_run(run: RunFolder, step: int, repository: str, *, is_adapter: bool) -> dict[str, Content]:
    """Card, recipe and curves."""
    recipe = load_recipe(run.recipe)
    curves = Curves.read(run.path)
    recipe_yaml = run.recipe.read_text(encoding="utf-8")
    published = Published(
        repository=repository,
        environment=parse_json(run.environment.read_text(encoding="utf-8")),
        recipe=recipe_yaml,
        license=_license_of(recipe),
        curves=CURVES,
        adapter=is_adapter,
    )
    card = model_card(recipe.model_dump(mode="json"), results_until(curves.evals, step), step, published)
    return {CARD: card.encode(), RECIPE: recipe_yaml.encode(), CURVES: _draw_curves(curves)}


def results_until(evaluations: tuple[Line, ...], step: int) -> dict[str, float]:
    """First and last evaluation up to ``step``, as a model card takes them."""
    lines = [
        {name: value for name, value in line.items() if name.startswith("eval/")}
        for line in evaluations
        if line["step"] <= step
    ]
    if not lines:
        return {}
    return {f"{name} (before)": value for name, value in lines[0].items()} | lines[-1]


def _model_files(model: Path) -> dict[str, Path]:
    """Path by name of every file but the training state; those that the manifest lists are compared."""
    manifest = model / MANIFEST
    if not manifest.is_file():
        names = [str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()]
        return {name: model / name for name in sorted(names) if not _is_private(name)}
    listed = parse_json(manifest.read_text(encoding="utf-8"))
    names = [name for name in listed if not _is_private(name)]
    skipped = {str(path.relative_to(model)) for path in (model / TRAINING).rglob("*")}
    hashes = file_hashes(model, skip=skipped)
    for name in names:
        if name != CARD and hashes.get(name) != listed[name]:
            problem = "is not what was written (its SHA-256 differs)" if name in hashes else "is missing"
            raise UserError(f"{model / name} {problem}; push another checkpoint, or export the model again")
    return {name: model / name for name in names}


def _is_private(name: str) -> bool:
    """Whether a file stays here: optimizer and generators of a checkpoint, hidden files."""
    return any(part.startswith(".") for part in Path(name).parts) or Path(name).parts[0] == str(TRAINING)


def _license_of(recipe: AnyRecipe) -> str | None:
    """What the base model's card says; None where it says nothing or cannot be read."""
    try:
        with model_errors():
            card = local_file(recipe.model.path, recipe.model.revision, CARD)
        text = "" if card is None else card.read_text(encoding="utf-8")
        _, header, _ = text.split("---\n", 2)
        facts: Any = yaml.safe_load(header)
    except (OSError, ValueError, yaml.YAMLError):  # without a card or a header, or not reachable
        return None
    license_ = facts.get("license") if isinstance(facts, dict) else None
    return license_ if isinstance(license_, str) else None


def _draw_curves(curves: Curves) -> bytes:
    name = "run" if curves.folder is None else curves.folder.name
    return figure(Comparison(name, (), {name: [curves]}))


def _sha256(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
