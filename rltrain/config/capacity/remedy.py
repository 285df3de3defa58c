"""The nearest setting with which a workload fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.memory import phases_of
from rltrain.config.capacity.workload import Workload

MAX_GPUS = 1024
UTILIZATIONS = tuple(round(0.05 * step, 2) for step in range(2, 19))  # 0.10 to 0.90
# after the backend that was asked for
BACKENDS = (Backend.fsdp2, Backend.zero3, Backend.zero2, Backend.ddp)


@dataclass(frozen=True)
class Remedy:
    """A setting that fits; fields that stay as they are are None."""

    tokens_per_micro_batch: int | None
    gpu_memory_utilization: float | None
    tensor_parallel: int | None
    backend: Backend | None
    gpus: int | None

    def describe(self) -> str:
        """The changes, in the order in which they were tried."""
        changes = {
            "learner.tokens_per_micro_batch": self.tokens_per_micro_batch,
            "rollout.vllm.gpu_memory_utilization": self.gpu_memory_utilization,
            "rollout.vllm.tensor_parallel": self.tensor_parallel,
            "--backend": self.backend,
            "--gpus": self.gpus,
        }
        return ", ".join(f"{key} {value}" for key, value in changes.items() if value is not None)


def fits(load: Workload, cluster: Cluster) -> bool:
    return all(phase.fits for phase in phases_of(load, cluster))


def nearest_fit(load: Workload, cluster: Cluster) -> Remedy | None:
    """The first setting that fits; None if there is none up to ``MAX_GPUS`` GPUs.

    In this order: fewer tokens per micro-batch; another utilisation, where the recipe states one; both; more
    ranks that hold an engine together with the same three; another backend with all of these; twice the GPUs,
    and twice again.
    """
    gpus = cluster.gpus
    while gpus <= MAX_GPUS:
        for backend in _backends(cluster.backend, gpus):
            candidate = replace(cluster, gpus=gpus, backend=backend)
            for changed in _settings(load, candidate):
                if fits(changed, candidate):
                    return _remedy(load, changed, cluster, candidate)
        gpus *= 2
    return None


def highest_utilization(load: Workload, cluster: Cluster) -> float | None:
    """The largest share of the GPU that vLLM can have, in steps of 0.05; None if there is none or no vLLM."""
    if load.engine is None or load.engine.name != "vllm":
        return None
    fitting = [value for value in UTILIZATIONS if fits(load.change(load.tokens, value), cluster)]
    return max(fitting, default=None)


def smallest_cluster(load: Workload, gpu_bytes: int, backend: Backend) -> tuple[Cluster, Workload] | None:
    """The fewest GPUs, a power of two, on which ``load`` fits with its own tokens, the nearest utilisation
    and the fewest ranks of an engine, and the workload with both; None if ``MAX_GPUS`` are too few.
    """
    gpus = 1
    while gpus <= MAX_GPUS:
        cluster = Cluster(gpus, gpu_bytes, backend)
        for ranks in _engine_ranks(load, cluster):
            for utilization in _utilizations(load):
                changed = load.change(load.tokens, utilization, ranks)
                if fits(changed, cluster):
                    return cluster, changed
        gpus *= 2
    return None


def _backends(preferred: Backend, gpus: int) -> tuple[Backend, ...]:
    if gpus == 1:
        return (preferred,)
    return (preferred, *(backend for backend in BACKENDS if backend is not preferred))


def _utilizations(load: Workload) -> tuple[float | None, ...]:
    """The recipe's, then the others by their distance from it, larger ones first; only None where the
    recipe leaves it open.
    """
    engine = load.engine
    if engine is None or engine.name != "vllm" or engine.utilization is None:
        return (None,)
    preferred = engine.utilization
    others = sorted(
        set(UTILIZATIONS) - {preferred}, key=lambda value: (round(abs(value - preferred), 2), -value)
    )
    return (preferred, *others)


def _token_counts(load: Workload) -> list[int]:
    """The recipe's, then halves of it down to the longest example."""
    counts = [load.tokens]
    while counts[-1] // 2 >= load.longest_example:
        counts.append(counts[-1] // 2)
    if counts[-1] > load.longest_example:
        counts.append(load.longest_example)
    return counts


def _engine_ranks(load: Workload, cluster: Cluster) -> list[int | None]:
    """The recipe's, then twice as many, as far as one node and the model's heads allow."""
    engine = load.engine
    ranks: list[int | None] = [None]
    if engine is not None and engine.name == "vllm":
        wider = [engine.ranks * 2**power for power in range(1, 7)]
        ranks += [count for count in wider if _can_divide(load, cluster, count)]
    return ranks


def _can_divide(load: Workload, cluster: Cluster, ranks: int) -> bool:
    return cluster.ranks_per_node % ranks == 0 and load.policy.heads % ranks == 0


def _settings(load: Workload, cluster: Cluster) -> Iterator[Workload]:
    preferred, *others = _utilizations(load)
    counts = _token_counts(load)
    for ranks in _engine_ranks(load, cluster):
        for tokens in counts:
            yield load.change(tokens, preferred, ranks)
        for utilization in others:
            yield load.change(load.tokens, utilization, ranks)
        for tokens in counts[1:]:
            for utilization in others:
                yield load.change(tokens, utilization, ranks)


def _count_server_gpus(load: Workload) -> int:
    """GPUs of ``--gpus`` that are not the learner's."""
    engine = load.engine
    return 0 if engine is None or engine.is_elsewhere else engine.server_gpus


def _remedy(load: Workload, changed: Workload, cluster: Cluster, candidate: Cluster) -> Remedy:
    before = None if load.engine is None else load.engine.utilization
    after = None if changed.engine is None else changed.engine.utilization
    ranks = None if load.engine is None or changed.engine is None else changed.engine.ranks
    backend_matters = candidate.gpus > 1 and candidate.backend is not cluster.backend
    return Remedy(
        tokens_per_micro_batch=changed.tokens if changed.tokens != load.tokens else None,
        gpu_memory_utilization=after if after != before else None,
        tensor_parallel=ranks if load.engine is not None and ranks != load.engine.ranks else None,
        backend=candidate.backend if backend_matters else None,
        gpus=candidate.gpus + _count_server_gpus(load) if candidate.gpus != cluster.gpus else None,
    )
