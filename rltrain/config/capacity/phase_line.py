"""What the plan expects of one phase of a run, in one line."""

from __future__ import annotations

from rltrain.config.capacity.cluster import Cluster
from rltrain.config.capacity.constants import GB
from rltrain.config.capacity.memory import phases_of
from rltrain.config.capacity.workload import ShapeReader, workload_of
from rltrain.config.schema import AnyRecipe

_PHASES = {"sync": "push"}  # phases of a run whose name differs in the plan


def describe_phase(recipe: AnyRecipe, read: ShapeReader, cluster: Cluster, phase: str | None) -> str:
    """The bytes of ``phase`` term by term, as ``rltrain plan`` counts them.

    phase: of a run; None, and a phase that the plan does not know: the largest of the plan.
    """
    try:
        load = workload_of(recipe, read)
    except LookupError:
        return f"rltrain plan has no line for it: {recipe.model.path} has no config.json that it counts"
    phases = {item.name: item for item in phases_of(load, cluster) if item.limit is not None}
    largest = max(phases.values(), key=lambda item: item.total)
    expected = phases.get(_PHASES.get(phase or "", phase or ""), largest)
    terms = ", ".join(f"{term.name} {term.bytes / GB:.2f}" for term in expected.terms)
    backend = "" if cluster.gpus == 1 else f" under {cluster.backend}"
    return (
        f"rltrain plan expects {expected.total / GB:.2f} GB of {cluster.gpu_bytes / GB:.1f} in "
        f"{expected.name} on {cluster.gpus} GPUs{backend}: {terms}"
    )
