"""``rltrain plan --gpus N --gpu-gb M``: does the recipe fit, what would, and where the time goes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

import typer
from rich.console import Console
from rich.table import Table

from rltrain.config.capacity.cluster import Cluster
from rltrain.config.capacity.constants import GB, Rates
from rltrain.config.capacity.memory import OVERHEADS, Phase
from rltrain.config.capacity.report import CapacityPlan, plan_capacity, to_json
from rltrain.config.capacity.shape import KINDS, ModelShape, read_shape
from rltrain.config.capacity.workload import Engine, workload_of
from rltrain.config.schema import AnyRecipe
from rltrain.errors import UserError
from rltrain.model_files import config_file


def capacity_command(
    recipe: AnyRecipe, cluster: Cluster, rates: Rates, warnings: Sequence[str], *, as_json: bool
) -> int:
    """Prints the plan; returns 0 if the recipe fits, otherwise 1. Raises UserError for a model without a
    readable config.
    """
    try:
        load = workload_of(recipe, _shape_of_model)
    except LookupError:
        raise UserError(_explain_missing(recipe.model.path)) from None
    plan = plan_capacity(load, _without_server(cluster, load.engine), rates)
    if as_json:
        typer.echo(json.dumps(to_json(plan) | {"warnings": list(warnings)}, indent=1))
    else:
        _print_plan(plan)
        for warning in warnings:
            typer.echo(f"warning: {warning}")
    return 0 if plan.fits else 1


def _without_server(cluster: Cluster, engine: Engine | None) -> Cluster:
    """The learner's part of the GPUs. Raises UserError where a server leaves it none."""
    if engine is None or not engine.server_gpus:
        return cluster
    taken = 0 if engine.is_elsewhere else engine.server_gpus
    if cluster.gpus <= taken:
        raise UserError(
            f"--gpus {cluster.gpus}: the server of rollout.engine vllm_server takes {taken} of them "
            "(rollout.server.tensor_parallel x data_parallel) and leaves the learner none; give more, or use "
            "rollout.engine vllm, which shares the learner's"
        )
    return replace(cluster, gpus=cluster.gpus - taken, server_gpus=engine.server_gpus)


def _shape_of_model(path: str, revision: str | None) -> ModelShape | None:
    file = config_file(path, revision)
    return None if file is None else read_shape(file)


def _explain_missing(path: str) -> str:
    return (
        f"model.path {path}: there is no config.json of a kind that the plan counts ({', '.join(KINDS)}) in "
        f"this folder, in the Hub's cache or on the Hub; run hf download {shlex.quote(path)} config.json, or "
        "set model.path to a folder with that file"
    )


def _print_plan(plan: CapacityPlan) -> None:
    cluster = plan.cluster
    console = Console(soft_wrap=True, highlight=False)
    models = ", ".join(
        f"{model.role} {model.shape.parameters:,} parameters" for model in plan.workload.trained
    )
    backend = "" if cluster.gpus == 1 else f", {cluster.backend}"
    console.print(f"{cluster.gpus} x {cluster.gpu_bytes / GB:g} GB{backend}; {models}{_server_note(plan)}")
    for note in plan.workload.notes:
        console.print(f"note: {note}")
    console.print(_phase_table(plan))
    _print_verdict(plan, console)
    if plan.durations:
        console.print(_duration_table(plan))
        narrowest = plan.bottleneck
        assert narrowest is not None
        console.print(
            f"step {plan.step_seconds:,.0f} s at most, by arithmetic on the rates of an {plan.card}; "
            f"bottleneck: {narrowest.phase} ({narrowest.limit})"
        )
    _print_split(plan, console)


def _print_split(plan: CapacityPlan, console: Console) -> None:
    split = plan.split
    if plan.cost is not None and plan.cost.overlaps:
        console.print(
            "sampling and learning go on at once: a step is the slower one of the two, and the push"
        )
    if split is None:
        return
    console.print(
        f"best split of {plan.cluster.gpus + plan.cluster.server_gpus} GPUs: {split.learner_gpus} learn, "
        f"{split.server_gpus} sample: {split.cost.seconds:,.0f} s a step"
    )


def _server_note(plan: CapacityPlan) -> str:
    engine = plan.workload.engine
    if engine is None or not engine.server_gpus:
        return ""
    where = "on another machine" if engine.is_elsewhere else "of this machine"
    return f"; beside them {engine.server_gpus} {where} for the server"


def _phase_table(plan: CapacityPlan) -> Table:
    table = Table("phase", "GB", "of", "", "GB per GPU, term by term", box=None, pad_edge=False)
    for column in table.columns[1:3]:
        column.justify = "right"
    for phase in plan.phases:
        terms = ", ".join(f"{name} {size / GB:.1f}" for name, size in _row_terms(phase))
        limit = "" if phase.limit is None else f"{phase.limit / GB:.1f}"
        verdict = "" if phase.limit is None else "FITS" if phase.fits else "OOM"
        table.add_row(phase.name, f"{phase.total / GB:.1f}", limit, verdict, terms)
    return table


def _row_terms(phase: Phase) -> Iterator[tuple[str, int]]:
    """The terms of a phase; those that belong to no tensor as one."""
    for term in phase.terms:
        if term.name not in OVERHEADS:
            yield term.name, term.bytes
    if overhead := sum(term.bytes for term in phase.terms if term.name in OVERHEADS):
        yield "outside tensors", overhead


def _print_verdict(plan: CapacityPlan, console: Console) -> None:
    if plan.fits:
        console.print(f"FITS{_utilization_hint(plan)}")
    elif plan.remedy is not None:
        console.print(f"OOM; fits with {plan.remedy.describe()}")
    else:
        console.print(f"OOM; {plan.obstacle}")


def _utilization_hint(plan: CapacityPlan) -> str:
    engine = plan.workload.engine
    if engine is not None and plan.chooses_utilization:
        return f"; vLLM gets {engine.utilization:g} of each GPU"
    share = plan.highest_utilization
    return "" if share is None else f"; with rollout.vllm.gpu_memory_utilization up to {share:g}"


def _duration_table(plan: CapacityPlan) -> Table:
    table = Table("phase of a step", "s", "limited by", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for duration in plan.durations:
        table.add_row(duration.phase, f"{duration.seconds:,.0f}", duration.limit)
    return table
