"""What a short run at learning rate 0 says about a recipe on this machine: with weights at rest,
whatever moves is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch

from rltrain.config.schema import OnlinePairsRecipe, OnlineRecipe, SampledRecipe
from rltrain.errors import UserError
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.train.memory import GPU, HOST, Memory
from rltrain.train.mismatch import MismatchGuard

WEIGHTS = "the engine holds the learner's weights"
AGREE = "engine and learner agree on log-probs"
FLAT = "their difference stays flat"
REWARDS = "rewards answer in time"
JUDGE = "the judge answers in time"
START, STEPS = "learner and engine start", "the steps run to their end"  # asked only where the answer is no

EXPECTED = (WeightMismatchError, torch.OutOfMemoryError, UserError)  # errors whose message says it all
_FULL = 0.9  # share of a memory beyond which a longer completion or a neighbour ends the run
_GRADERS_OWN = "none"  # a grader that declines to judge is no failure
_NO_ROOM = (
    "can't allocate memory",
    "not enough memory",
)  # what torch says in a plain RuntimeError where the machine's memory is spent


R = TypeVar("R", bound=SampledRecipe)


@dataclass(frozen=True)
class Finding:
    """One line of the verdict."""

    question: str
    fine: bool | None  # None: not reached
    measured: str


def at_zero_learning_rate(recipe: R, steps: int) -> R:
    """``recipe`` for ``steps`` steps whose updates change nothing but take all that they take in a run.

    No group is replaced. There is no evaluation, checkpoint or tracker, and no mismatch stops it. What else
    must change for every row to take part in the gradient pass depends on the kind of recipe:
    ``online_at_rest``, ``pairs_at_rest``.
    """
    still = recipe.learner.optimizer.model_copy(update={"lr": 0.0, "warmup_steps": 0, "schedule": "constant"})
    changes = {
        "data": recipe.data.model_copy(update={"eval": None}),
        "rollout": recipe.rollout.model_copy(
            update={"trust_logp": False, "mismatch_patience": steps + 1, "dynamic_sampling": None}
        ),
        "learner": recipe.learner.model_copy(update={"optimizer": still}),
        "train": recipe.train.model_copy(update={"steps": steps}),
        "checkpoint": recipe.checkpoint.model_copy(update={"every": 0}),
        "report": recipe.report.model_copy(update={"sinks": (), "transcripts": 0}),
    }
    return recipe.model_copy(update=changes)


def online_at_rest(recipe: OnlineRecipe) -> OnlineRecipe:
    """Every row takes part in the gradient pass, and the process reward model learns nothing either."""
    changes: dict[str, Any] = {"learner": recipe.learner.model_copy(update={"skip_idle_rows": False})}
    process = recipe.process_reward
    if process is not None:
        still = process.optimizer.model_copy(update={"lr": 0.0})
        changes["process_reward"] = process.model_copy(update={"optimizer": still})
    return recipe.model_copy(update=changes)


def pairs_at_rest(recipe: OnlinePairsRecipe) -> OnlinePairsRecipe:
    """The judge's ties are pairs too."""
    pairs = recipe.pairs.model_copy(update={"verdict": "drawn", "tolerance": 0.0})
    return recipe.model_copy(update={"pairs": pairs})


def diagnose(
    recipe: SampledRecipe,
    steps: Sequence[Mapping[str, float]],
    guard: MismatchGuard,
    memories: Sequence[Memory],
    *,
    judged: bool,
) -> list[Finding]:
    """``steps``: the metrics of a run of ``at_zero_learning_rate``, first to last. judged: whether a
    judge makes pairs.
    """
    deadline, longest = recipe.train.deadline_seconds, recipe.rollout.max_tokens
    judge = [_judge_finding(deadline, steps)] if judged else []
    memory = [_memory_finding(longest, steps, of_device, judged=judged) for of_device in memories]
    return [*_engine_findings(steps, guard), _reward_finding(deadline, steps), *judge, *memory]


def with_few_steps(error: BaseException, stage: str, *, judged: bool) -> list[Finding]:
    """The verdict where ``error`` ended the run: the question that it answers, and the others, which were not
    reached.

    stage: START or STEPS, asked where the error answers none of the others.
    """
    judge = [JUDGE] if judged else []
    memories = [f"{name} suffices" for name in (HOST, GPU) if name == HOST or torch.cuda.is_available()]
    asked = [WEIGHTS, AGREE, FLAT, REWARDS, *judge, *memories]
    question = _answered_by(error) or stage
    lines = str(error).split("\n")
    text = " ".join(lines) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {lines[0]}"
    answer = Finding(question, False, text)
    findings = [answer if name == question else Finding(name, None, "not reached") for name in asked]
    return findings if answer in findings else [answer, *findings]


def _answered_by(error: BaseException) -> str | None:
    if isinstance(error, WeightMismatchError):
        return WEIGHTS
    if isinstance(error, torch.OutOfMemoryError):
        return f"{GPU} suffices"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_ROOM):
        return f"{HOST} suffices"
    return None


def slope(values: Sequence[float]) -> float:
    """Least-squares slope per step; 0 for a single value."""
    return float(np.polyfit(np.arange(len(values)), np.asarray(values), 1)[0]) if len(values) > 1 else 0.0


def _engine_findings(steps: Sequence[Mapping[str, float]], guard: MismatchGuard) -> list[Finding]:
    values = [step["rollout/mismatch_abs"] for step in steps]
    largest, difference = (
        max(step[name] for step in steps) for name in ("rollout/mismatch_max", "sync/difference")
    )
    rise, room = slope(values) * (len(values) - 1), max(fmean(values), guard.warn / 2)
    compared = sum(int(step["sync/checked"]) for step in steps)
    return [
        Finding(WEIGHTS, True, f"{compared} comparisons, largest relative difference {difference:.1e}"),
        Finding(
            AGREE,
            all(value <= guard.warn for value in values),
            f"mean {fmean(values):.1e} nats (at most {guard.warn:g}), largest {largest:.1e}",
        ),
        Finding(
            FLAT,
            abs(rise) <= room,
            f"first {values[0]:.1e}, last {values[-1]:.1e}, slope {slope(values):+.1e} per step (at most "
            f"{room:.1e} over the run)",
        ),
    ]


def _reward_finding(deadline_seconds: float, steps: Sequence[Mapping[str, float]]) -> Finding:
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
        REWARDS,
        not failed and float(seconds.max()) <= deadline_seconds / 2,
        f"{np.quantile(seconds, 0.5):.2f} s a step (p99 {np.quantile(seconds, 0.99):.2f}, longest "
        f"{seconds.max():.2f}), "
        f"ungraded of {completions}: {ungraded}",
    )


def _judge_finding(deadline_seconds: float, steps: Sequence[Mapping[str, float]]) -> Finding:
    seconds = np.array([step["time/judge"] for step in steps])
    asked, pairs, silent = (
        int(sum(step[f"pairs/{name}"] for step in steps)) for name in ("compared", "count", "unjudged")
    )
    return Finding(
        JUDGE,
        (pairs > 0 or silent == 0) and float(seconds.max()) <= deadline_seconds / 2,
        f"{np.quantile(seconds, 0.5):.2f} s a step (longest {seconds.max():.2f}), {asked} comparisons, "
        f"{silent} without a verdict",
    )


def _memory_finding(
    max_tokens: int, steps: Sequence[Mapping[str, float]], memory: Memory, *, judged: bool
) -> Finding:
    """A step that took no gradient says nothing of the memory that gradients take."""
    name, what = ("pairs/count", "pairs") if judged else ("learner/trained_rows", "rows")
    rows, longest = (int(max(step[key] for step in steps)) for key in (name, "rollout/length_max"))
    held = "" if memory.processes == 1 else f" in {memory.processes} processes"
    return Finding(
        f"{memory.name} suffices",
        rows > 0 and memory.peak <= _FULL * memory.size,
        f"peak {memory.peak / 2**30:.2f} of {memory.size / 2**30:.1f} GiB{held}, with gradients of {rows} "
        f"{what} a step and "
        f"completions of up to {longest} of {max_tokens} tokens",
    )
