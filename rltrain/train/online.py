"""The online loop: sample, annotate, weigh, update, push the weights, report.

In each step the rollout source returns graded completions of the current policy; the learner annotates them
with the log-probs and statistics that the recipe's methods need; the methods turn rewards into advantages and
weights; the learner updates the policy; the engine gets the new weights.

The loop does not know which methods run: the recipe names them and ``build/online.py`` binds them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rltrain.advantage.stage import compute_advantages
from rltrain.config.schema import OnlineRecipe
from rltrain.control.coefficient import Controller
from rltrain.control.stage import PerUpdateControls, apply_control
from rltrain.learner.policy_learner import PolicyLearner, UpdateStats
from rltrain.learner.process_reward import ProcessRewardLearner
from rltrain.loss.objective import Objective
from rltrain.loss.terms.distill import reference_powers
from rltrain.registry import BoundMethod
from rltrain.report.law import Law
from rltrain.report.metrics import (
    completion_metrics,
    mismatch_metrics,
    own_step_metrics,
    source_metrics,
    staleness_metrics,
    turn_entropies,
    why_no_update,
    worker_metrics,
)
from rltrain.report.token_numbers import TokenTensors
from rltrain.rollout.collate import collate
from rltrain.rollout.source import Rollouts
from rltrain.rollout.steps import StepSplitter
from rltrain.seeds import stable_hash
from rltrain.train.evaluate import Evaluation
from rltrain.train.loop import Clock, timing_metrics
from rltrain.train.mismatch import MismatchGuard, choose_rows, find_workers
from rltrain.train.sampled_run import SampledRun
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.samples import SOURCE_POLICY, SOURCE_REFERENCE, ScoredGroup

ROUNDING_GRAD_NORM = 1e-6  # a gradient of at most this norm may consist of rounding errors alone
# the learner's statistics that have a field in ``TrainBatch``; all others go into ``TrainBatch.extra``
BATCH_FIELDS = {
    "logp": "old_logp",
    "entropy": "old_entropy",
    "ref_logp": "ref_logp",
    "teacher_logp": "teacher_logp",
}


@dataclass(frozen=True, kw_only=True)
class OnlineRun(SampledRun):
    """The parts of one online run; ``build/online.py`` assembles them."""

    recipe: OnlineRecipe
    learner: PolicyLearner
    process_reward: ProcessRewardLearner | None  # a second model that learns the reward of each token
    advantage: BoundMethod
    # controls with statistics over the whole step
    step_controls: tuple[BoundMethod, ...]
    # controls with statistics over one optimizer batch, computed from the policy just before its update
    update_controls: PerUpdateControls | None
    objective: Objective
    # (name of the loss term, controller of its coefficient)
    controllers: tuple[tuple[str, Controller], ...]
    # forward passes without gradient that the recipe needs: "logp", "entropy", "ref_logp", ...
    passes: frozenset[str]
    # divides completions without turns into reasoning steps; None where no method needs them
    step_splitter: StepSplitter | None
    mismatch: MismatchGuard
    law: Law

    def evaluate(self) -> Evaluation | None:
        """Held-out pass@k of the current weights, which also adds a point to the law's fit."""
        result = super().evaluate()
        if result is not None:
            self.law.evaluation(result.metrics())
        return result


@dataclass(frozen=True)
class Step:
    """The data of one step between sampling and update.

    Row i of ``rows``, ``sampled`` and ``batch`` is the same completion.
    """

    number: int
    rollouts: Rollouts
    rows: TokenRows
    sampled: TrainBatch  # the batch before any method changed it
    batch: TrainBatch  # the batch that the update reads
    metrics: Mapping[str, float]  # measured before the update
    version: int = 0  # of the policy before the update

    def replace(self, batch: TrainBatch, **metrics: float) -> Step:
        """The same step with another batch and further metrics."""
        return dataclasses.replace(self, batch=batch, metrics={**self.metrics, **metrics})


def train_online(run: OnlineRun) -> Path:
    """Trains the policy for every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError after too many updates in a row without a finite loss and gradient, and Stopped as
    ``TrainingRun.steps`` does.
    """
    run.push(expect_change=False)
    for number in run.steps():
        rollouts = run.take(number)
        clock = Clock(rollouts.seconds)
        lr = run.learner.lr

        with clock("annotate"):
            step = collate_step(run, number, rollouts)
            step = annotate(run, step)
            step = apply_methods(run, step)
        with clock("update"):
            update = run.learner.update(step.rows, step.batch, run.objective, run.update_controls)
        if run.recipe.rollout.lag:
            with clock("wait"):
                run.settle()
        with clock("sync"):
            push_metrics = run.push(expect_change=must_change_weights(update.metrics, lr))

        metrics = report_step(run, step, update, lr, push_metrics, clock.seconds)
        adapt_to_step(run, step, update, metrics)
    return run.finish()


# annotate ---------------------------------------------------------------------------------------------------


def collate_step(run: OnlineRun, number: int, rollouts: Rollouts) -> Step:
    """The completions of all groups as token rows and a batch of tensors."""
    rows, sampled = collate(rollouts.groups, run.step_splitter)
    sampled = sampled.with_metrics(**rollouts.control_metrics)
    return Step(number, rollouts, rows, sampled, sampled, {}, run.learner.version)


def annotate(run: OnlineRun, step: Step) -> Step:
    """Adds exactly those statistics of the learner and of the process reward model that the recipe's methods
    need.
    """
    batch = step.batch
    if run.recipe.rollout.trust_logp:
        batch = batch.replace(old_logp=batch.rollout_logp)

    extra: dict[str, Tensor] = {}
    if run.passes:
        values = run.learner.annotate(step.rows, run.passes, reference_powers(run.passes, batch))
        alignment = values.pop("alignment", None)
        if alignment is not None:  # a single number per row, repeated at each of its tokens
            batch = batch.with_metrics(alignment=float(alignment[:, 0].mean()))
        fields = {BATCH_FIELDS[name]: value for name, value in values.items() if name in BATCH_FIELDS}
        batch = batch.replace(**fields)
        extra = {name: value for name, value in values.items() if name not in BATCH_FIELDS}
    batch = disable_importance_correction(batch.with_extra(**extra))
    if run.process_reward is None:
        return step.replace(batch, **measure_mismatch(run, step))

    judged = run.process_reward.judge(step.rows, batch)
    batch = batch.replace(process_reward=judged.reward)
    return step.replace(batch, **judged.metrics, **measure_mismatch(run, step))


def disable_importance_correction(batch: TrainBatch) -> TrainBatch:
    """Sets the sampling log-probs of rows that the policy did not sample at the base temperature to
    ``old_logp``.

    Such a row comes from another temperature, another model or the data set. It is there to pull the policy
    towards it, so no importance weight may correct for its origin (arXiv:2510.08141).
    """
    if batch.old_logp is None or batch.rollout_logp is None:
        return batch
    from_policy = (batch.source == SOURCE_POLICY)[:, None]
    return batch.replace(rollout_logp=torch.where(from_policy, batch.rollout_logp, batch.old_logp))


def measure_mismatch(run: OnlineRun, step: Step) -> dict[str, float]:
    """The difference between the engine's and the learner's log-probs, where no other pass measures it.

    With several updates per step, only the gradient pass of the first update runs the policy that sampled.
    An extra pass therefore scores as many rows as that update takes.
    """
    updates = run.recipe.learner.updates
    sampled = step.sampled
    if updates == 1 or "logp" in run.passes or sampled.rollout_logp is None:
        return {}
    policy_rows = torch.nonzero(sampled.source == SOURCE_POLICY).flatten()
    first = policy_rows[: max(1, len(policy_rows) // updates)].tolist()
    seed = stable_hash(run.recipe.seed, "rescored", step.number)
    workers = choose_rows(find_workers(row_workers(step.rollouts.groups)), seed)
    rows = sorted({*first, *itertools.chain.from_iterable(workers.values())})
    logp = run.learner.annotate(step.rows.rows(torch.tensor(rows)), frozenset({"logp"}))["logp"]
    part = sampled.rows(torch.tensor(rows), logp.shape[1])
    assert part.rollout_logp is not None
    place = {row: number for number, row in enumerate(rows)}
    places = {worker: [place[row] for row in chosen] for worker, chosen in workers.items()}
    pooled = [place[row] for row in first]
    return {
        **mismatch_metrics(logp[pooled], part.rollout_logp[pooled], part.mask[pooled]),
        **worker_metrics(places, logp, part.rollout_logp, part.mask),
    }


def row_workers(groups: Sequence[ScoredGroup]) -> list[str]:
    """The worker that sampled each row; empty: there are not several, or the policy did not sample it."""
    return [
        completion.worker if completion.source == SOURCE_POLICY else ""
        for group in groups
        for completion in group.completions
    ]


# advantages and controls ------------------------------------------------------------------------------------


def apply_methods(run: OnlineRun, step: Step) -> Step:
    """Computes the advantages, then applies the controls in the recipe's order, over the whole step.

    They run on the learner's device, while the engine sleeps. The result is on the CPU again: a step of long
    completions takes more memory there than an update has left.
    """
    batch = compute_advantages(step.batch.to(run.learner.device), run.advantage)
    for control in run.step_controls:
        batch = apply_control(batch, control)
    return drop_reference_rows(step.replace(batch.to("cpu")))


def drop_reference_rows(step: Step) -> Step:
    """Removes the reference model's rows: the advantages need them, but the policy is not trained on them."""
    reference = step.batch.source == SOURCE_REFERENCE
    if not bool(reference.any()):
        return step
    kept = torch.nonzero(~reference).flatten()
    rows = step.rows.rows(kept)
    width = max(map(len, rows.completions))
    sampled = step.sampled.rows(kept, width)
    batch = step.batch.rows(kept, width)
    return dataclasses.replace(step, rows=rows, sampled=sampled, batch=batch)


# push -------------------------------------------------------------------------------------------------------


def must_change_weights(metrics: Mapping[str, float], lr: float) -> bool:
    """Whether the update must have changed the weights.

    A gradient that consists of rounding errors may leave all of them as they were.
    """
    return lr > 0 and metrics["learner/grad_norm"] > ROUNDING_GRAD_NORM


# report -----------------------------------------------------------------------------------------------------


def report_step(
    run: OnlineRun,
    step: Step,
    update: UpdateStats,
    lr: float,
    push_metrics: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """Sends the step's metrics to every sink and prints one line on the terminal; returns the metrics."""
    rollouts = step.rollouts
    batch = step.batch
    logp = update.logp if batch.old_logp is None or run.recipe.rollout.trust_logp else batch.old_logp
    entropy = sampling_entropy(batch, update)
    counts = completion_metrics(rollouts.groups) | source_metrics(rollouts.groups)
    tokens = sum(
        value for name, value in counts.items() if name.startswith("rollout/") and name.endswith("tokens")
    )
    metrics = {
        **counts,
        **own_step_metrics(batch, logp, entropy, step.sampled.mask),
        **({} if run.recipe.rollout.environment is None else turn_entropies(batch, entropy)),
        **measure_workers(step, logp),
        **update.metrics,
        **coefficient_metrics(run),
        **step.metrics,
        **push_metrics,
        "learner/lr": lr,
        "learner/version": run.learner.version,
        "learner/idle_rows": update.idle_rows,
        "learner/trained_rows": update.trained_rows,
        "learner/trained_tokens": update.trained_tokens,
        "learner/skipped_updates": update.skipped_updates,
        "rollout/generated_groups": rollouts.generated_groups,
        "rollout/rounds": rollouts.rounds,
        **rollouts.logged_metrics,
        **timing_metrics(seconds, tokens=tokens),
    }
    if run.recipe.rollout.oldest:
        metrics |= staleness_metrics(step.sampled, logp, step.version)
    metrics |= run.law.step(metrics)

    is_unchanged = update.metrics["learner/grad_norm"] == 0 or lr == 0
    reason = why_no_update(batch, lr) if is_unchanged else None
    tensors = TokenTensors(batch, logp, sampling_entropy(batch, update), update.clipped, update.touched)
    run.reporter.step(step.number, metrics, rollouts.groups, reason, tensors)

    # the difference to older samples is the policy's own movement, whatever the engine does
    is_current = bool((step.sampled.oldest == step.version).all()) or not run.recipe.rollout.oldest
    warning = run.mismatch.check(step.number, metrics) if is_current else None
    if warning is not None:
        run.reporter.warn(warning)
    message = run.law.message()
    if message is not None:
        run.reporter.message(message)
    return metrics


def measure_workers(step: Step, logp: Tensor) -> dict[str, float]:
    """Each worker's mismatch, unless ``measure_mismatch`` has it. logp: (B, T) of the learner."""
    # the reference model's rows have been removed since they were scored
    sources = [completion.source for group in step.rollouts.groups for completion in group.completions]
    names = zip(row_workers(step.rollouts.groups), sources, strict=True)
    workers = find_workers([name for name, source in names if source != SOURCE_REFERENCE])
    if not workers or step.sampled.rollout_logp is None or "rollout/mismatch_abs" in step.metrics:
        return {}
    return worker_metrics(
        workers, logp, step.sampled.rollout_logp.to(logp.device), step.sampled.mask.to(logp.device)
    )


def sampling_entropy(batch: TrainBatch, update: UpdateStats) -> Tensor:
    """(B, T) nats: the entropy of the policy that sampled, at each token."""
    return update.entropy if batch.old_entropy is None else batch.old_entropy


def coefficient_metrics(run: OnlineRun) -> dict[str, float]:
    """The coefficients and further inputs that the controllers give their loss terms in this step."""
    metrics: dict[str, float] = {}
    for term, controller in run.controllers:
        metrics[f"loss/{term}_coefficient"] = controller()
        metrics |= {
            f"loss/{term}_{name}": value
            for name, value in controller.inputs().items()
            if isinstance(value, float)  # turns have theirs in learner/entropy_turn_*
        }
    return metrics


# adapt ------------------------------------------------------------------------------------------------------


def adapt_to_step(run: OnlineRun, step: Step, update: UpdateStats, metrics: Mapping[str, float]) -> None:
    """Shows the step's numbers to the rollout source and to the coefficient controllers, which adapt to them.

    This precedes the step's checkpoint. The numbers are equal on every rank.
    """
    policy_tokens = step.sampled.mask & (step.sampled.source == SOURCE_POLICY)[:, None]
    run.source.observe(metrics, sampling_entropy(step.batch, update), policy_tokens)
    for _, controller in run.controllers:
        controller.observe(metrics)
