"""What a short run at learning rate 0 says about a recipe on this machine: with weights at rest, whatever moves is a fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from rltrain.config.schema import PairRecipe, Recipe
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
_NO_ROOM = ("can't allocate memory", "not enough memory")  # what torch says in a plain RuntimeError where the machine's memory is spent


@dataclass(frozen=True)
class Finding:
    """One line of the verdict."""

    question: str
    fine: bool | None  # None: not reached
    measured: str


def at_rest(recipe: Recipe | PairRecipe, steps: int) -> Recipe | PairRecipe:
    """``recipe`` for ``steps`` steps whose updates change nothing but take all that they take in a run.

    Every row goes through the gradient pass, whatever its reward: no group is replaced or idle, and the judge's ties are pairs. There
    is no evaluation, checkpoint or tracker, and no mismatch stops it.
    """
    still = recipe.learner.optimizer.model_copy(update={"lr": 0.0, "warmup_steps": 0, "schedule": "constant"})
    changes = {
        "data": recipe.data.model_copy(update={"eval": None}),
        "rollout": recipe.rollout.model_copy(update={"trust_logp": False, "mismatch_patience": steps + 1, "dynamic_sampling": None}),
        "learner": recipe.learner.model_copy(update={"optimizer": still}),
        "train": recipe.train.model_copy(update={"steps": steps}),
        "checkpoint": recipe.checkpoint.model_copy(update={"every": 0}),
        "report": recipe.report.model_copy(update={"sinks": (), "transcripts": 0}),
    }
    if isinstance(recipe, PairRecipe):
        changes["pairs"] = recipe.pairs.model_copy(update={"verdict": "drawn", "tolerance": 0.0})
    else:
        changes["learner"] = changes["learner"].model_copy(update={"skip_idle_rows": False})
        if (process := recipe.process_reward) is not None:
            changes["process_reward"] = process.model_copy(update={"optimizer": process.optimizer.model_copy(update={"lr": 0.0})})
    return recipe.model_copy(update=changes)


def diagnose(
    recipe: Recipe | PairRecipe, steps: Sequence[Mapping[str, float]], guard: MismatchGuard, memories: Sequence[Memory]
) -> list[Finding]:
    """``steps``: the metrics of a run of ``at_rest(recipe)``, first to last."""
    judge = [_judge_finding(recipe, steps)] if isinstance(recipe, PairRecipe) else []
    memory = [_memory_finding(recipe, steps, one) for one in memories]
    return [*_engine_findings(steps, guard), _reward_finding(recipe, steps), *judge, *memory]


def cut_short(recipe: Recipe | PairRecipe, error: BaseException, stage: str) -> list[Finding]:
    """The verdict where ``error`` ended the run: the question that it answers, and the others, which were not reached.

    stage: START or STEPS, asked where the error answers none of the others.
    """
    judge = [JUDGE] if isinstance(recipe, PairRecipe) else []
    memories = [f"{name} suffices" for name in (HOST, GPU) if name == HOST or torch.cuda.is_available()]
    asked, question = [WEIGHTS, AGREE, FLAT, REWARDS, *judge, *memories], _answered_by(error) or stage
    lines = str(error).split("\n")
    answer = Finding(question, False, " ".join(lines) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {lines[0]}")
    others = [answer if one == question else Finding(one, None, "not reached") for one in asked]
    return others if answer in others else [answer, *others]


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
    largest, difference = (max(step[name] for step in steps) for name in ("rollout/mismatch_max", "sync/difference"))
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
            f"first {values[0]:.1e}, last {values[-1]:.1e}, slope {slope(values):+.1e} per step (at most {room:.1e} over the run)",
        ),
    ]


def _reward_finding(recipe: Recipe | PairRecipe, steps: Sequence[Mapping[str, float]]) -> Finding:
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
        not failed and float(seconds.max()) <= recipe.train.deadline_seconds / 2,
        f"{np.quantile(seconds, 0.5):.2f} s a step (p99 {np.quantile(seconds, 0.99):.2f}, longest {seconds.max():.2f}), "
        f"ungraded of {completions}: {ungraded}",
    )


def _judge_finding(recipe: PairRecipe, steps: Sequence[Mapping[str, float]]) -> Finding:
    seconds = np.array([step["time/judge"] for step in steps])
    asked, pairs, silent = (int(sum(step[f"pairs/{name}"] for step in steps)) for name in ("compared", "count", "unjudged"))
    return Finding(
        JUDGE,
        (pairs > 0 or silent == 0) and float(seconds.max()) <= recipe.train.deadline_seconds / 2,
        f"{np.quantile(seconds, 0.5):.2f} s a step (longest {seconds.max():.2f}), {asked} comparisons, {silent} without a verdict",
    )


def _memory_finding(recipe: Recipe | PairRecipe, steps: Sequence[Mapping[str, float]], memory: Memory) -> Finding:
    """A step that took no gradient says nothing of the memory that gradients take."""
    name, what = ("pairs/count", "pairs") if isinstance(recipe, PairRecipe) else ("learner/trained_rows", "rows")
    rows, longest = (int(max(step[key] for step in steps)) for key in (name, "rollout/length_max"))
    held = "" if memory.processes == 1 else f" in {memory.processes} processes"
    return Finding(
        f"{memory.name} suffices",
        rows > 0 and memory.peak <= _FULL * memory.size,
        f"peak {memory.peak / 2**30:.2f} of {memory.size / 2**30:.1f} GiB{held}, with gradients of {rows} {what} a step and "
        f"completions of up to {longest} of {recipe.rollout.max_tokens} tokens",
    )
