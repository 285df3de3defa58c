"""``rltrain plan RECIPE --measured RUN``: seconds of the recipe's step by the rates that a run measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.config.capacity.measured import MeasuredStep, StepNumbers, measure_step
from rltrain.config.capacity.overlap import Split, StepCost, divide_gpus
from rltrain.config.capacity.workload import Engine, engine_of
from rltrain.config.load import load_recipe
from rltrain.config.schema import AnyRecipe, SampledRecipe
from rltrain.errors import UserError
from rltrain.timeline import read_timeline

__all__ = ["measure_run", "measured_command"]

_LEARNING = ("time/annotate", "time/update")


def measured_command(recipe: AnyRecipe, run: Path, gpus: int | None, *, as_json: bool) -> int:
    """Prints the plan; returns 0. gpus: of learner and workers together, to be divided between them.

    Raises UserError where the recipe does not sample, or the run cannot say how long anything took.
    """
    if not isinstance(recipe, SampledRecipe):
        raise UserError(f"--measured: kind {recipe.kind} samples nothing, so that nothing can be divided")
    measured, rows = measure_run(RunFolder.from_path(run))
    engine = engine_of(recipe)
    size = recipe.rollout.prompts * recipe.rollout.n / rows
    workers = engine.server_gpus // engine.gpus_per_worker if engine.gpus_per_worker else measured.workers
    cost = measured.predict(measured.learners, workers, overlaps=engine.overlaps, size=size)
    split = None if gpus is None else _divide(measured, engine, gpus, size)
    if as_json:
        typer.echo(json.dumps(_to_json(measured, cost, workers, split), indent=1))
    else:
        for line in _describe(measured, cost, workers, split, gpus):
            typer.echo(line)
    return 0


def measure_run(folder: RunFolder) -> tuple[MeasuredStep, int]:
    """What a step of the run took, and its completions."""
    if not folder.recipe.is_file() or not folder.metrics.is_file():
        raise UserError(
            f"--measured {folder.path}: no run folder with steps; name one that rltrain train wrote"
        )
    recipe = load_recipe(folder.recipe)
    if not isinstance(recipe, SampledRecipe):
        raise UserError(f"--measured {folder.path}: that run sampled nothing; name one that did")
    numbers: dict[int, StepNumbers] = {}
    for text in folder.metrics.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "time/update" in line:
            learning = sum(line.get(name, 0.0) for name in _LEARNING)
            numbers[line["step"]] = StepNumbers(learning, line["rollout/tokens"])
    environment = json.loads(folder.environment.read_text(encoding="utf-8"))
    measured = measure_step(
        read_timeline(folder.timeline),
        numbers,
        environment.get("processes", 1),
        ahead=recipe.rollout.oldest,
        runs_freely=recipe.rollout.bound is not None,
        overlaps=engine_of(recipe).overlaps,
    )
    return measured, recipe.rollout.prompts * recipe.rollout.n


def _divide(measured: MeasuredStep, engine: Engine, gpus: int, size: float) -> Split | None:
    """Raises UserError where the engine has no GPUs of its own among them."""
    if not engine.gpus_per_worker:
        raise UserError(
            f"--measured with --gpus {gpus}: rollout.engine {engine.name} shares the learner's devices, so "
            "there is nothing to divide; leave --gpus out, or set rollout.engine to vllm_server"
        )

    def cost_of(learners: int, servers: int) -> StepCost:
        workers = servers // engine.gpus_per_worker
        return measured.predict(learners, workers, overlaps=engine.overlaps, size=size)

    limit = engine.most_learners if engine.overlaps else None
    return divide_gpus(gpus, engine.gpus_per_worker, cost_of, most_learners=limit)


def _describe(
    measured: MeasuredStep, cost: StepCost, workers: int, split: Split | None, gpus: int | None
) -> Iterator[str]:
    rate = measured.tokens / (measured.sampling * measured.workers) if measured.sampling else 0.0
    yield (
        f"measured in steps {measured.steps[0]} to {measured.steps[-1]}: "
        f"{_count(measured.workers, 'worker')} sampled {measured.tokens:,.0f} tokens in "
        f"{measured.sampling:.3g} s ({rate:,.0f} tokens/s each), "
        f"{_count(measured.learners, 'learner process', 'learner processes')} learned from them in "
        f"{measured.learning:.3g} s, a push took {measured.push:.3g} s"
    )
    if cost.overlaps:
        yield "sampling and learning go on at once: a step is the slower one of the two, and the push"
    yield (
        f"step {cost.seconds:.3g} s with {_count(workers, 'worker')} and "
        f"{_count(measured.learners, 'learner process', 'learner processes')} (sampling "
        f"{cost.sampling:.3g}, learning {cost.learning:.3g}, push {cost.push:.3g}); bottleneck: "
        f"{cost.bottleneck}"
    )
    if gpus is not None:
        yield (
            f"{gpus} GPUs are too few for a learner and a worker"
            if split is None
            else f"best split of {gpus} GPUs: {split.learner_gpus} learn, {split.server_gpus} sample: "
            f"{split.cost.seconds:.3g} s a step, by rates as measured; grading and evaluations not included"
        )


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _to_json(measured: MeasuredStep, cost: StepCost, workers: int, split: Split | None) -> dict[str, Any]:
    facts = asdict(measured) | {"steps": [measured.steps[0], measured.steps[-1]]}
    return {
        "measured": facts,
        "workers": workers,
        "step_seconds": cost.seconds,
        "sampling_seconds": cost.sampling,
        "learning_seconds": cost.learning,
        "push_seconds": cost.push,
        "overlaps": cost.overlaps,
        "bottleneck": cost.bottleneck,
        "split": None
        if split is None
        else {
            "gpus": split.learner_gpus,
            "server_gpus": split.server_gpus,
            "step_seconds": split.cost.seconds,
        },
    }
