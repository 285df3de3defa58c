"""The online loop: take rollouts, annotate, advantages and controls, update, push weights, report.

It is blind to which methods run: they are the recipe's, bound in ``build/online.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    why_no_update,
)
from rltrain.rollout.collate import collate
from rltrain.rollout.source import Rollouts, RolloutSource
from rltrain.rollout.steps import StepSplitter
from rltrain.sync.colocated import Sync
from rltrain.train.evaluate import Evaluation, Evaluator
from rltrain.train.loop import Clock, TrainingRun, timing_metrics
from rltrain.train.mismatch import MismatchGuard
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.samples import SOURCE_POLICY, SOURCE_REFERENCE

ROUNDING = 1e-6  # norm of a gradient below which rounding errors alone may have made it
BATCH_FIELDS = {
    "logp": "old_logp",
    "entropy": "old_entropy",
    "ref_logp": "ref_logp",
    "teacher_logp": "teacher_logp",
}


@dataclass(frozen=True, kw_only=True)
class OnlineRun(TrainingRun):
    """Everything that one online run is made of; ``build/online.py`` puts it together."""

    recipe: OnlineRecipe
    learner: PolicyLearner
    source: RolloutSource
    sync: Sync
    evaluator: Evaluator | None
    process_reward: ProcessRewardLearner | None  # a second model that learns what each token earned
    advantage: BoundMethod
    step_controls: tuple[BoundMethod, ...]  # statistics over the whole step
    update_controls: (
        PerUpdateControls | None
    )  # statistics over one optimizer batch, of the policy as it is then
    objective: Objective
    controllers: tuple[
        tuple[str, Controller], ...
    ]  # of the objective's coefficients, each with the name of its term
    passes: frozenset[str]  # no-grad passes that the recipe needs: "logp", "entropy", "ref_logp", ...
    step_splitter: (
        StepSplitter | None
    )  # cuts completions without turns into reasoning steps, where a method needs them
    mismatch: MismatchGuard
    law: Law

    def push(self, *, expect_change: bool) -> dict[str, float]:
        """Gives the learner's weights to whatever samples, proved; metrics of the push."""
        learner = self.learner
        return self.sync.push(
            learner.weights, learner.version, expect_change=expect_change, norms=learner.weight_norms
        )

    def evaluate(self) -> Evaluation | None:
        """Held-out pass@k with the weights as they are: one more point for the law."""
        if self.evaluator is None:
            return None
        result = self.evaluator.evaluate(self.source, self.learner.version)
        self.sync.verify_all(self.learner.weights)
        self.law.evaluation(result.metrics())
        self.reporter.once(result.note)
        return result

    def close(self) -> None:
        self.source.close()
        self.reporter.close()


@dataclass(frozen=True)
class Step:
    """One step's rollouts on their way to the update.

    Rows of ``rows``, ``sampled`` and ``batch`` correspond.
    """

    number: int
    rollouts: Rollouts
    rows: TokenRows
    sampled: TrainBatch  # as sampled, before any method touched it
    batch: TrainBatch  # what the update gets
    metrics: Mapping[str, float]  # of passes and models before the update

    def replace(self, batch: TrainBatch, **metrics: float) -> Step:
        return dataclasses.replace(self, batch=batch, metrics={**self.metrics, **metrics})


def train_online(run: OnlineRun) -> Path:
    """Takes every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError when the numbers are lost, and Stopped as ``TrainingRun.steps`` does.
    """
    run.push(expect_change=False)
    for number in run.steps():
        rollouts = run.source.take(number, run.learner.version)
        clock, lr = Clock(rollouts.seconds), run.learner.lr

        with clock("annotate"):
            step = annotate(run, collate_step(run, number, rollouts))
            step = apply_methods(run, step)
        with clock("update"):
            update = run.learner.update(step.rows, step.batch, run.objective, run.update_controls)
        with clock("sync"):
            pushed = run.push(expect_change=must_change_weights(update.metrics, lr))

        metrics = report_step(run, step, update, lr, pushed, clock.seconds)
        observe_step(run, step, update, metrics)
    return run.finish()


def must_change_weights(metrics: Mapping[str, float], lr: float) -> bool:
    """Whether the update must have changed the weights.

    A gradient made of rounding errors may change none.
    """
    return lr > 0 and metrics["learner/grad_norm"] > ROUNDING


# annotate ---------------------------------------------------------------------------------------------------


def collate_step(run: OnlineRun, number: int, rollouts: Rollouts) -> Step:
    """The rollouts as token rows and a batch."""
    rows, sampled = collate(rollouts.groups, run.step_splitter)
    sampled = sampled.with_metrics(**rollouts.metrics)
    return Step(number, rollouts, rows, sampled, sampled, {})


def annotate(run: OnlineRun, step: Step) -> Step:
    """Adds what the recipe's methods need of the learner and of the process reward model, and nothing
    more.
    """
    batch, extra = step.batch, {}
    if run.recipe.rollout.trust_logp:
        batch = batch.replace(old_logp=batch.rollout_logp)
    if run.passes:
        values = run.learner.annotate(step.rows, run.passes, reference_powers(run.passes, batch))
        alignment = values.pop("alignment", None)
        if alignment is not None:  # one number per row, at each of its tokens
            batch = batch.with_metrics(alignment=float(alignment[:, 0].mean()))
        batch = batch.replace(
            **{BATCH_FIELDS[name]: value for name, value in values.items() if name in BATCH_FIELDS}
        )
        extra = {name: value for name, value in values.items() if name not in BATCH_FIELDS}
    batch = without_importance_correction(batch.with_extra(**extra))
    if run.process_reward is None:
        return step.replace(batch, **mismatch_before_updates(run, step))

    judged = run.process_reward.judge(step.rows, batch)
    batch = batch.replace(process_reward=judged.reward)
    return step.replace(batch, **judged.metrics, **mismatch_before_updates(run, step))


def without_importance_correction(batch: TrainBatch) -> TrainBatch:
    """Rows that the policy did not sample at the base temperature take ``old_logp`` for their sampling
    log-probs.

    No correction from another temperature, another model or a written answer is intended: those rows are
    there to pull the policy towards them (arXiv:2510.08141).
    """
    if batch.old_logp is None or batch.rollout_logp is None:
        return batch
    own = (batch.source == SOURCE_POLICY)[:, None]
    return batch.replace(rollout_logp=torch.where(own, batch.rollout_logp, batch.old_logp))


def mismatch_before_updates(run: OnlineRun, step: Step) -> dict[str, float]:
    """Mismatch of engine and learner, where no pass over all rows measures it.

    With several updates per step only the first update's gradient pass sees the policy that sampled, so one
    more pass is made over as many rows as that update takes.
    """
    updates, sampled = run.recipe.learner.updates, step.sampled
    if updates == 1 or "logp" in run.passes or sampled.rollout_logp is None:
        return {}
    own = torch.nonzero(sampled.source == SOURCE_POLICY).flatten()
    first = own[: max(1, len(own) // updates)]
    logp = run.learner.annotate(step.rows.rows(first), frozenset({"logp"}))["logp"]
    part = sampled.rows(first, logp.shape[1])
    assert part.rollout_logp is not None
    return mismatch_metrics(logp, part.rollout_logp, part.mask)


# advantages and controls ------------------------------------------------------------------------------------


def apply_methods(run: OnlineRun, step: Step) -> Step:
    """Advantages, then the controls in the recipe's order, over the whole step."""
    batch = compute_advantages(step.batch, run.advantage)
    for control in run.step_controls:
        batch = apply_control(batch, control)
    return drop_reference_rows(step.replace(batch))


def drop_reference_rows(step: Step) -> Step:
    """Without the reference model's rows, which serve the advantages and are not trained on."""
    reference = step.batch.source == SOURCE_REFERENCE
    if not bool(reference.any()):
        return step
    kept = torch.nonzero(~reference).flatten()
    rows = step.rows.rows(kept)
    width = max(map(len, rows.completions))
    sampled, batch = step.sampled.rows(kept, width), step.batch.rows(kept, width)
    return dataclasses.replace(step, rows=rows, sampled=sampled, batch=batch)


# report -----------------------------------------------------------------------------------------------------


def report_step(
    run: OnlineRun,
    step: Step,
    update: UpdateStats,
    lr: float,
    pushed: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """The step's numbers, sent to every sink, and one line on the terminal."""
    rollouts, batch = step.rollouts, step.batch
    logp = update.logp if batch.old_logp is None or run.recipe.rollout.trust_logp else batch.old_logp
    counted = completion_metrics(rollouts.groups) | source_metrics(rollouts.groups)
    tokens = sum(
        value for name, value in counted.items() if name.startswith("rollout/") and name.endswith("tokens")
    )
    metrics = {
        **counted,
        **own_step_metrics(batch, logp, entropy_of(batch, update), step.sampled.mask),
        **update.metrics,
        **coefficients(run),
        **step.metrics,
        **pushed,
        "learner/lr": lr,
        "learner/version": run.learner.version,
        "learner/idle_rows": update.idle_rows,
        "learner/trained_rows": update.trained_rows,
        "learner/trained_tokens": update.trained_tokens,
        "learner/skipped_updates": update.skipped_updates,
        "rollout/generated_groups": rollouts.generated_groups,
        "rollout/rounds": rollouts.rounds,
        **timing_metrics(seconds, tokens=tokens),
    }
    metrics |= run.law.step(metrics)

    nothing_moved = update.metrics["learner/grad_norm"] == 0 or lr == 0
    run.reporter.step(
        step.number, metrics, rollouts.groups, why_no_update(batch, lr) if nothing_moved else None
    )
    warning = run.mismatch.check(step.number, metrics)
    if warning is not None:
        run.reporter.warn(warning)
    message = run.law.message()
    if message is not None:
        run.reporter.message(message)
    return metrics


def entropy_of(batch: TrainBatch, update: UpdateStats) -> Tensor:
    """(B, T) nats, of the policy that sampled."""
    return update.entropy if batch.old_entropy is None else batch.old_entropy


def coefficients(run: OnlineRun) -> dict[str, float]:
    """The coefficients that controllers gave this step, as metrics."""
    metrics: dict[str, float] = {}
    for term, controller in run.controllers:
        metrics[f"loss/{term}_coefficient"] = controller()
        metrics |= {f"loss/{term}_{name}": value for name, value in controller.inputs().items()}
    return metrics


def observe_step(run: OnlineRun, step: Step, update: UpdateStats, metrics: Mapping[str, float]) -> None:
    """Whatever adapts to a step's numbers takes them in before the step's checkpoint.

    They are equal on every rank.
    """
    own = step.sampled.mask & (step.sampled.source == SOURCE_POLICY)[:, None]
    run.source.observe(metrics, entropy_of(step.batch, update), own)
    for _, controller in run.controllers:
        controller.observe(metrics)
