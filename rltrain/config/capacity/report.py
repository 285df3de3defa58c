"""A plan as one object: what the table and ``--json`` show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rltrain.config.capacity.cluster import Cluster
from rltrain.config.capacity.constants import Rates
from rltrain.config.capacity.duration import Duration, bottleneck, step_durations
from rltrain.config.capacity.memory import Phase, Term, phases_of, with_recomputation, with_utilization
from rltrain.config.capacity.overlap import Split, StepCost, divide_gpus
from rltrain.config.capacity.remedy import MAX_GPUS, UTILIZATIONS, Remedy, highest_utilization, nearest_fit
from rltrain.config.capacity.workload import Workload


@dataclass(frozen=True)
class CapacityPlan:
    """durations: of a step with rows of full length; empty where the recipe does not fit."""

    cluster: Cluster
    workload: Workload
    phases: tuple[Phase, ...]
    remedy: Remedy | None
    obstacle: str | None  # why nothing fits, where neither the recipe nor a remedy does
    highest_utilization: float | None  # of vLLM, with which the recipe fits as it is; None: none, or no vLLM
    chooses_utilization: bool  # whether vLLM's share of a GPU is the plan's, and not the recipe's
    durations: tuple[Duration, ...]
    card: str
    cost: StepCost | None = None  # of a step; None without an engine, and where the recipe does not fit
    split: Split | None = None  # the best one of the same GPUs, where the engine has its own among them

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)

    @property
    def bottleneck(self) -> Duration | None:
        """The longest phase; where sampling and learning go on at once, of the slower one of the two."""
        if self.cost is None or not self.cost.overlaps or not self.durations:
            return bottleneck(self.durations) if self.durations else None
        is_sampling = self.cost.bottleneck == "sampling"
        return bottleneck(tuple(item for item in self.durations if (item.phase == "rollout") == is_sampling))

    @property
    def step_seconds(self) -> float | None:
        if self.cost is not None:
            return self.cost.seconds
        return sum(duration.seconds for duration in self.durations) if self.durations else None


def plan_capacity(load: Workload, cluster: Cluster, rates: Rates) -> CapacityPlan:
    recipe_load = load
    load = with_recomputation(with_utilization(recipe_load, cluster), cluster)
    phases = phases_of(load, cluster)
    is_fine = all(phase.fits for phase in phases)
    remedy = None if is_fine else nearest_fit(recipe_load, cluster)
    durations = step_durations(load, cluster, rates) if is_fine else ()
    cost = _step_cost(load, cluster, durations)
    obstacle = _obstacle(recipe_load, cluster) if not is_fine and remedy is None else None
    return CapacityPlan(
        cluster=cluster,
        workload=load,
        phases=phases,
        remedy=remedy,
        obstacle=obstacle,
        highest_utilization=highest_utilization(load, cluster),
        chooses_utilization=load.engine != recipe_load.engine,
        durations=durations,
        card=rates.name,
        cost=cost,
        split=_best_split(recipe_load, cluster, rates),
    )


def _step_cost(load: Workload, cluster: Cluster, durations: tuple[Duration, ...]) -> StepCost | None:
    if load.engine is None or not durations:
        return None
    seconds = {duration.phase: duration.seconds for duration in durations}
    limit = load.engine.most_learners
    overlaps = load.engine.overlaps and (limit is None or cluster.gpus <= limit)
    return StepCost(seconds["rollout"], seconds["annotate"] + seconds["update"], seconds["push"], overlaps)


def _best_split(recipe_load: Workload, cluster: Cluster, rates: Rates) -> Split | None:
    """Of the GPUs that learner and workers have together."""
    engine = recipe_load.engine
    if engine is None or not engine.gpus_per_worker or engine.is_elsewhere:
        return None

    def cost_of(learners: int, servers: int) -> StepCost | None:
        divided = replace(cluster, gpus=learners, server_gpus=servers)
        load = with_recomputation(with_utilization(recipe_load, divided), divided)
        if not all(phase.fits for phase in phases_of(load, divided)):
            return None
        return _step_cost(load, divided, step_durations(load, divided, rates))

    limit = engine.most_learners if engine.overlaps else None
    total = cluster.gpus + cluster.server_gpus
    return divide_gpus(total, engine.gpus_per_worker, cost_of, most_learners=limit)


def to_json(plan: CapacityPlan) -> dict[str, Any]:
    """Bytes and seconds as numbers. The keys are stable."""
    cluster = plan.cluster
    remedy = plan.remedy
    return {
        "gpus": cluster.gpus,
        "server_gpus": cluster.server_gpus,
        "gpu_bytes": cluster.gpu_bytes,
        "backend": cluster.form,
        "parameters": {model.role: model.shape.parameters for model in plan.workload.trained},
        "fits": plan.fits,
        "phases": [
            {
                "name": phase.name,
                "bytes": phase.total,
                "limit": phase.limit,
                "fits": phase.fits,
                "terms": {term.name: term.bytes for term in phase.terms},
            }
            for phase in plan.phases
        ],
        "remedy": None
        if remedy is None
        else {
            "tokens_per_micro_batch": remedy.tokens_per_micro_batch,
            "gpu_memory_utilization": remedy.gpu_memory_utilization,
            "tensor_parallel": remedy.tensor_parallel,
            "backend": None if remedy.backend is None else remedy.backend.value,
            "gpus": remedy.gpus,
        },
        "obstacle": plan.obstacle,
        "recomputed_share": plan.workload.recomputed,
        "utilization": None if plan.workload.engine is None else plan.workload.engine.utilization,
        "highest_utilization": plan.highest_utilization,
        "card": plan.card,
        "durations": [
            {"phase": item.phase, "seconds": item.seconds, "limit": item.limit} for item in plan.durations
        ],
        "bottleneck": None if plan.bottleneck is None else plan.bottleneck.phase,
        "step_seconds": plan.step_seconds,
        "overlaps": plan.cost is not None and plan.cost.overlaps,
        "split": None
        if plan.split is None
        else {
            "gpus": plan.split.learner_gpus,
            "server_gpus": plan.split.server_gpus,
            "step_seconds": plan.split.cost.seconds,
        },
        "notes": list(plan.workload.notes),
    }


def _obstacle(load: Workload, cluster: Cluster) -> str:
    """The phase that is too large even on ``MAX_GPUS`` GPUs, with the fewest tokens and the utilisation that
    brings it closest.
    """
    largest = replace(cluster, gpus=MAX_GPUS)
    tokens = min(load.tokens, load.longest_example)
    settings = [None] if load.engine is None or load.engine.name != "vllm" else [*UTILIZATIONS]
    tries = [max(phases_of(load.change(tokens, value), largest), key=_excess) for value in settings]
    phase = min(tries, key=_excess)
    term: Term = max(phase.terms, key=lambda item: item.bytes)
    assert phase.limit is not None
    return (
        f"even on {MAX_GPUS} GPUs, {phase.name} takes {phase.total / 1e9:.1f} of {phase.limit / 1e9:.1f} GB, "
        f"{term.bytes / 1e9:.1f} of them {term.name}, which more GPUs do not divide; use larger GPUs or a "
        "smaller model"
    )


def _excess(phase: Phase) -> int:
    """Bytes beyond the limit."""
    return phase.total - (phase.total if phase.limit is None else phase.limit)
