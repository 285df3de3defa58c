"""What a short run at learning rate 0 says about a recipe on this machine: with weights at rest, whatever moves is a fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rltrain.config.schema import Recipe
from rltrain.train.mismatch import MismatchGuard

_FULL = 0.9  # share of a memory beyond which a longer completion or a neighbour ends the run
_GRADERS_OWN = "none"  # a grader that declines to judge is no failure


@dataclass(frozen=True)
class Finding:
    """One line of the verdict."""

    question: str
    fine: bool
    measured: str


@dataclass(frozen=True)
class Memory:
    """Peak use of one memory, in bytes."""

    name: str
    peak: float
    size: float


def at_rest(recipe: Recipe, steps: int) -> Recipe:
    """``recipe`` for ``steps`` steps whose updates change nothing; no evaluation, checkpoint or tracker, and no mismatch stops it."""
    still = recipe.learner.optimizer.model_copy(update={"lr": 0.0, "warmup_steps": 0, "schedule": "constant"})
    changes = {
        "data": recipe.data.model_copy(update={"eval": None}),
        "rollout": recipe.rollout.model_copy(update={"trust_logp": False, "mismatch_patience": steps + 1}),
        "learner": recipe.learner.model_copy(update={"optimizer": still}),
        "train": recipe.train.model_copy(update={"steps": steps}),
        "checkpoint": recipe.checkpoint.model_copy(update={"every": 0}),
        "report": recipe.report.model_copy(update={"sinks": (), "transcripts": 0}),
    }
    return recipe.model_copy(update=changes)


def diagnose(recipe: Recipe, steps: Sequence[Mapping[str, float]], guard: MismatchGuard, memories: Sequence[Memory]) -> list[Finding]:
    """``steps``: the metrics of a run of ``at_rest(recipe)``, first to last."""
    return [*_engine_findings(steps, guard), _reward_finding(recipe, steps), *(_memory_finding(recipe, steps, one) for one in memories)]


def slope(values: Sequence[float]) -> float:
    """Least-squares slope per step; 0 for a single value."""
    return float(np.polyfit(np.arange(len(values)), np.asarray(values), 1)[0]) if len(values) > 1 else 0.0


def _engine_findings(steps: Sequence[Mapping[str, float]], guard: MismatchGuard) -> list[Finding]:
    values = [step["rollout/mismatch_abs"] for step in steps]
    largest, difference = (max(step[name] for step in steps) for name in ("rollout/mismatch_max", "sync/difference"))
    rise, room = slope(values) * (len(values) - 1), max(fmean(values), guard.warn / 2)
    compared = sum(int(step["sync/checked"]) for step in steps)
    return [
        Finding("the engine holds the learner's weights", True, f"{compared} comparisons, largest relative difference {difference:.1e}"),
        Finding(
            "engine and learner agree on log-probs",
            all(value <= guard.warn for value in values),
            f"mean {fmean(values):.1e} nats (at most {guard.warn:g}), largest {largest:.1e}",
        ),
        Finding(
            "their difference stays flat",
            abs(rise) <= room,
            f"first {values[0]:.1e}, last {values[-1]:.1e}, slope {slope(values):+.1e} per step (at most {room:.1e} over the run)",
        ),
    ]


def _reward_finding(recipe: Recipe, steps: Sequence[Mapping[str, float]]) -> Finding:
    seconds = np.array([step["time/reward"] for step in steps])
    counts: dict[str, int] = {}
    for step in steps:
        for name, count in step.items():
            if name.startswith("reward/ungraded/"):
                reason = name.removeprefix("reward/ungraded/")
                counts[reason] = counts.get(reason, 0) + int(count)
    failed = any(not reason.endswith(_GRADERS_OWN) for reason in counts)
    completions = sum(int(step["rollout/completions"]) for step in steps)
    ungraded = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"
    return Finding(
        "rewards answer in time",
        not failed and float(seconds.max()) <= recipe.train.deadline_seconds / 2,
        f"{np.quantile(seconds, 0.5):.2f} s a step (p99 {np.quantile(seconds, 0.99):.2f}, longest {seconds.max():.2f}), "
        f"ungraded of {completions}: {ungraded}",
    )


def _memory_finding(recipe: Recipe, steps: Sequence[Mapping[str, float]], memory: Memory) -> Finding:
    longest = int(max(step["rollout/length_max"] for step in steps))
    return Finding(
        f"{memory.name} suffices",
        memory.peak <= _FULL * memory.size,
        f"peak {memory.peak / 2**30:.2f} of {memory.size / 2**30:.1f} GiB, with completions of up to {longest} of "
        f"{recipe.rollout.max_tokens} tokens",
    )
