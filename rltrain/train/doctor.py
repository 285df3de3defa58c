"""Diagnoses a recipe on this machine from a short run at learning rate 0: the weights do not change, so any
change in the numbers is a fault.
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
from rltrain.train.memory import GPU, HOST, Memory, is_gpu_out_of_memory
from rltrain.train.mismatch import MismatchGuard

WEIGHTS = "the engine holds the learner's weights"
AGREE = "engine and learner agree on log-probs"
FLAT = "their difference stays flat"
REWARDS = "rewards answer in time"
JUDGE = "the judge answers in time"
# asked only where the answer is no
START = "learner and engine start"
STEPS = "the steps run to their end"

EXPECTED = (WeightMismatchError, torch.OutOfMemoryError, UserError)  # errors whose message needs no context
_FULL = 0.9  # share of a memory beyond which a longer completion or another process may end the run
_DECLINED = "none"  # reason of a grader that declines to judge, which is no failure
# in torch's plain RuntimeError where the machine's memory is exhausted
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")


R = TypeVar("R", bound=SampledRecipe)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    question: str
    is_fine: bool | None  # None: not reached
    measured: str


def freeze_recipe(recipe: R, steps: int) -> R:
    """``recipe`` with ``steps`` steps at learning rate 0: updates change no weight, but take the time and
    memory that they take in a run.

    Dynamic sampling, evaluation, checkpoints and trackers are off, and no mismatch stops the run. The changes
    that let every row take part in the gradient pass depend on the kind of recipe
    (``online_with_every_row_trained``, ``pairs_with_every_row_trained``).
    """
    optimizer = recipe.learner.optimizer.model_copy(
        update={"lr": 0.0, "warmup_steps": 0, "schedule": "constant"}
    )
    changes = {
        "data": recipe.data.model_copy(update={"eval": None}),
        "rollout": recipe.rollout.model_copy(
            update={"trust_logp": False, "mismatch_patience": steps + 1, "dynamic_sampling": None}
        ),
        "learner": recipe.learner.model_copy(update={"optimizer": optimizer}),
        "train": recipe.train.model_copy(update={"steps": steps}),
        "checkpoint": recipe.checkpoint.model_copy(update={"every": 0}),
        "report": recipe.report.model_copy(update={"sinks": (), "transcripts": 0}),
    }
    return recipe.model_copy(update=changes)


def online_with_every_row_trained(recipe: OnlineRecipe) -> OnlineRecipe:
    """Lets every row take part in the gradient pass, and stops the learning of the process reward model."""
    changes: dict[str, Any] = {"learner": recipe.learner.model_copy(update={"skip_idle_rows": False})}
    process = recipe.process_reward
    if process is not None:
        optimizer = process.optimizer.model_copy(update={"lr": 0.0})
        changes["process_reward"] = process.model_copy(update={"optimizer": optimizer})
    return recipe.model_copy(update=changes)


def pairs_with_every_row_trained(recipe: OnlinePairsRecipe) -> OnlinePairsRecipe:
    """Makes pairs of the judge's ties too."""
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
    """The findings of a complete run of ``freeze_recipe``. steps: its metrics, first to last. judged: whether
    a judge makes pairs.
    """
    deadline = recipe.train.deadline_seconds
    max_tokens = recipe.rollout.max_tokens
    judge_findings = [_judge_finding(deadline, steps)] if judged else []
    memory_findings = [_memory_finding(max_tokens, steps, memory, judged=judged) for memory in memories]
    return [
        *_engine_findings(steps, guard),
        _reward_finding(deadline, steps),
        *judge_findings,
        *memory_findings,
    ]


def diagnose_error(error: BaseException, stage: str, *, judged: bool) -> list[Finding]:
    """The findings where ``error`` ended the run: the question that it answers, and the others, which were
    not reached.

    stage: START or STEPS, the question where the error answers none of the others.
    """
    judge_questions = [JUDGE] if judged else []
    memories = [f"{name} suffices" for name in (HOST, GPU) if name == HOST or torch.cuda.is_available()]
    questions = [WEIGHTS, AGREE, FLAT, REWARDS, *judge_questions, *memories]

    failed = _failed_question(error) or stage
    lines = str(error).split("\n")
    text = " ".join(lines) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {lines[0]}"
    answer = Finding(failed, False, text)
    findings = [
        answer if question == failed else Finding(question, None, "not reached") for question in questions
    ]
    return findings if answer in findings else [answer, *findings]


def _failed_question(error: BaseException) -> str | None:
    if isinstance(error, WeightMismatchError):
        return WEIGHTS
    if is_gpu_out_of_memory(error):
        return f"{GPU} suffices"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        return f"{HOST} suffices"
    return None


def slope(values: Sequence[float]) -> float:
    """Least-squares slope per step; 0 for a single value."""
    return float(np.polyfit(np.arange(len(values)), np.asarray(values), 1)[0]) if len(values) > 1 else 0.0


def _engine_findings(steps: Sequence[Mapping[str, float]], guard: MismatchGuard) -> list[Finding]:
    values = [step["rollout/mismatch_abs"] for step in steps]
    largest = max(step["rollout/mismatch_max"] for step in steps)
    difference = max(step["sync/difference"] for step in steps)
    rise = slope(values) * (len(values) - 1)
    max_rise = max(fmean(values), guard.warn / 2)
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
            abs(rise) <= max_rise,
            f"first {values[0]:.1e}, last {values[-1]:.1e}, slope {slope(values):+.1e} per step (at most "
            f"{max_rise:.1e} over the run)",
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
    has_failed = any(not reason.endswith(_DECLINED) for reason in counts)
    completions = sum(int(step["rollout/completions"]) for step in steps)
    ungraded = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"
    return Finding(
        REWARDS,
        not has_failed and float(seconds.max()) <= deadline_seconds / 2,
        f"{np.quantile(seconds, 0.5):.2f} s a step (p99 {np.quantile(seconds, 0.99):.2f}, longest "
        f"{seconds.max():.2f}), ungraded of {completions}: {ungraded}",
    )


def _judge_finding(deadline_seconds: float, steps: Sequence[Mapping[str, float]]) -> Finding:
    seconds = np.array([step["time/judge"] for step in steps])
    compared = int(sum(step["pairs/compared"] for step in steps))
    pairs = int(sum(step["pairs/count"] for step in steps))
    unjudged = int(sum(step["pairs/unjudged"] for step in steps))
    return Finding(
        JUDGE,
        (pairs > 0 or unjudged == 0) and float(seconds.max()) <= deadline_seconds / 2,
        f"{np.quantile(seconds, 0.5):.2f} s a step (longest {seconds.max():.2f}), {compared} comparisons, "
        f"{unjudged} without a verdict",
    )


def _memory_finding(
    max_tokens: int, steps: Sequence[Mapping[str, float]], memory: Memory, *, judged: bool
) -> Finding:
    """A run without gradients says nothing about the memory that gradients take, so the answer is no."""
    name, unit = ("pairs/count", "pairs") if judged else ("learner/trained_rows", "rows")
    rows = int(max(step[name] for step in steps))
    longest = int(max(step["rollout/length_max"] for step in steps))
    processes = "" if memory.processes == 1 else f" in {memory.processes} processes"
    return Finding(
        f"{memory.name} suffices",
        rows > 0 and memory.peak <= _FULL * memory.size,
        f"peak {memory.peak / 2**30:.2f} of {memory.size / 2**30:.1f} GiB{processes}, with gradients of "
        f"{rows} {unit} a step and completions of up to {longest} of {max_tokens} tokens",
    )
