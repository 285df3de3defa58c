"""What ``rltrain doctor`` says of ranks and workers: do they run the same, and how fast do weights travel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.train.doctor import Finding

__all__ = ["RANKS", "SPEED", "WORKERS", "RankFacts", "machine_findings"]

RANKS = "all ranks run the same"
WORKERS = "all workers answer and run the same"
SPEED = "weights travel to the workers"


@dataclass(frozen=True)
class RankFacts:
    """rank: its number. node: its machine. software: version by package, and the precision."""

    rank: int
    node: str
    software: Mapping[str, str]


def machine_findings(ranks: Sequence[RankFacts], engine: Any) -> list[Finding]:
    """engine: what the run samples with, on rank 0; without workers there is nothing to say about them."""
    findings = [rank_finding(ranks)]
    describe = getattr(engine, "describe_workers", None)
    if describe is not None:
        findings.append(worker_finding(describe()))
        if engine.push_cost is not None:  # an adapter's push is files
            findings.append(speed_finding(engine.push_cost))
    return findings


def rank_finding(ranks: Sequence[RankFacts]) -> Finding:
    nodes = Counter(facts.node for facts in ranks)
    where = ", ".join(f"{node} ({count})" for node, count in nodes.items())
    first = ranks[0]
    differences = [
        f"rank {facts.rank} on {facts.node} has {name} {facts.software.get(name, '-')}, rank 0 "
        f"{first.software.get(name, '-')}"
        for facts in ranks[1:]
        for name in sorted({*facts.software, *first.software})
        if facts.software.get(name) != first.software.get(name)
    ]
    if differences:
        return Finding(RANKS, False, "; ".join(differences[:5]) + "; install the same on every machine")
    software = ", ".join(f"{name} {version}" for name, version in first.software.items())
    return Finding(RANKS, True, f"{len(ranks)} on {where}: {software}")


def worker_finding(workers: Mapping[str, Any]) -> Finding:
    """workers: by name what each says that it runs with (``ServerInfo``), or the error it raised."""
    errors = [f"{name}: {info}" for name, info in workers.items() if isinstance(info, Exception)]
    if errors or not workers:
        return Finding(WORKERS, False, "; ".join(errors) or "none serves")
    kinds = Counter(f"vLLM {info.version}, {info.dtype}" for info in workers.values())
    shown = "; ".join(f"{count} with {kind}" for kind, count in kinds.items())
    names = ", ".join(workers)
    return Finding(WORKERS, len(kinds) == 1, f"{shown}: {names}")


def speed_finding(cost: Any) -> Finding:
    """cost: ``sync.pool.PushCost`` of the last push that anybody took."""
    rate = cost.bytes * cost.workers / cost.seconds / 2**20
    return Finding(
        SPEED,
        True,
        f"{cost.bytes / 2**20:.1f} MiB to {cost.workers} in {cost.seconds:.2f} s, every weight proved: "
        f"{rate:.0f} MiB/s",
    )
