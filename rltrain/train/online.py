"""The online loop: sample, grade, annotate, weigh, update, sync, report. One page, blind to which method runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rltrain.advantage.stage import assign
from rltrain.config.schema import Recipe
from rltrain.control.coefficient import Controller
from rltrain.control.stage import Adjustment, apply
from rltrain.learner.accelerate_learner import AccelerateLearner, UpdateStats
from rltrain.learner.process_reward import ProcessRewardLearner
from rltrain.loss.objective import Objective
from rltrain.loss.terms_distill import reference_powers
from rltrain.protocols import RolloutEngine
from rltrain.registry import BoundMethod
from rltrain.report.law import Law
from rltrain.report.metrics import arm_metrics, completion_metrics, mismatch_metrics, own_step_metrics, why_zero
from rltrain.rollout.collate import collate
from rltrain.rollout.producer import Produced, Producer
from rltrain.rollout.steps import Lines
from rltrain.sync.in_process import Sync
from rltrain.train.course import Clock, Course, timing, walk
from rltrain.train.evaluate import Evaluation, Evaluator, evaluate_policy
from rltrain.train.mismatch import MismatchGuard
from rltrain.types import ARM_POLICY, ARM_REFERENCE, TokenRows, TrainBatch

ROUNDING = 1e-6  # a gradient's norm up to which it may be of rounding errors alone


@dataclass(frozen=True)
class Run(Course):
    """Everything one online run is made of; ``build.py`` puts it together."""

    recipe: Recipe
    learner: AccelerateLearner
    engine: RolloutEngine
    sync: Sync
    producer: Producer
    evaluator: Evaluator | None
    process_reward: ProcessRewardLearner | None  # learns beside the policy what each token earned
    advantage: BoundMethod
    step_controls: tuple[BoundMethod, ...]  # statistics over the whole step
    adjust: Adjustment | None  # controls with statistics over one optimizer batch, with the policy as it is then
    objective: Objective
    controllers: tuple[tuple[str, Controller], ...]  # of the objective's coefficients, each with the name of its term
    annotate: frozenset[str]  # no-grad passes the recipe needs: "logp", "entropy", "ref_logp"
    lines: Lines | None  # cuts completions without turns into steps, where a function of the recipe needs them
    mismatch: MismatchGuard
    law: Law


def train(run: Run) -> Path:
    """Run every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError when the numbers are lost, Stopped as ``walk`` does.
    """
    run.sync.push(run.learner.weights(), run.learner.version, expect_change=False)
    return walk(run, run.recipe.train.steps, partial(evaluate, run), partial(take, run))


def take(run: Run, step: int) -> None:
    """One step: sample, annotate and weigh, update, give the engine the new weights, report."""
    learner, clock = run.learner, Clock()
    produced = run.producer.next(step, learner.version)
    with clock("sync"):
        run.sync.verify()
    run.engine.sleep()  # on GPU the learner takes the memory
    with clock("annotate"):
        rows, sampled = collate(produced.groups, run.lines)
        sampled = sampled.noted(**produced.notes)
        noted, judged = process_rewards(run, rows, annotated(run, rows, sampled))
        judged = judged | mismatch_before_updates(run, rows, sampled)
        rows, sampled, batch = trained(rows, sampled, weigh(run, noted))
    lr = learner.lr
    with clock("update"):
        update = learner.update(rows, batch, run.objective, run.adjust)
    with clock("sync"):
        run.engine.wake()
        synced = run.sync.push(learner.weights(), learner.version, expect_change=moves(update.metrics, lr))
    metrics = report(run, step, produced, sampled, batch, update, lr, produced.seconds | clock.seconds, judged | synced)
    observe(run, metrics)
    if run.producer.temperature is not None:
        run.producer.temperature.observe(entropy_of(batch, update), sampled.mask & (sampled.arm == ARM_POLICY)[:, None])


def moves(metrics: Mapping[str, float], lr: float) -> bool:
    """Whether an update of these metrics must have changed the weights. A gradient of rounding errors alone may change none."""
    return lr > 0 and metrics["learner/grad_norm"] > ROUNDING


def annotated(run: Run, rows: TokenRows, batch: TrainBatch) -> TrainBatch:
    """The batch with what the recipe's functions need of the learner, and nothing more."""
    if run.recipe.rollout.trust_logp:
        batch = batch.replace(old_logp=batch.rollout_logp)
    notes = run.learner.annotate(rows, run.annotate, reference_powers(run.annotate, batch)) if run.annotate else {}
    if (alignment := notes.pop("alignment", None)) is not None:  # one number per row, at each of its tokens
        batch = batch.noted(alignment=float(alignment[:, 0].mean()))
    fields = {"logp": "old_logp", "entropy": "old_entropy", "ref_logp": "ref_logp", "teacher_logp": "teacher_logp"}
    batch = batch.replace(**{field: notes[name] for name, field in fields.items() if name in notes})
    return uncorrected(batch.with_extra(**{name: value for name, value in notes.items() if name not in fields}))


def mismatch_before_updates(run: Run, rows: TokenRows, batch: TrainBatch) -> dict[str, float]:
    """Engine/learner mismatch of a step of several updates for which no pass takes the log-probs of all rows: only the first update's
    gradient pass has those of the policy that sampled. One more pass, over as many rows as that update takes."""
    updates = run.recipe.learner.updates
    if updates == 1 or "logp" in run.annotate or batch.rollout_logp is None:
        return {}
    own = torch.nonzero(batch.arm == ARM_POLICY).flatten()
    few = own[: max(1, len(own) // updates)]
    logp = run.learner.annotate(rows.rows(few), frozenset({"logp"}))["logp"]
    part = batch.rows(few, logp.shape[1])
    assert part.rollout_logp is not None
    return mismatch_metrics(logp, part.rollout_logp, part.mask)


def process_rewards(run: Run, rows: TokenRows, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
    """The batch with what the process reward model says of each token, and its numbers; it learns from the step's outcomes here."""
    if run.process_reward is None:
        return batch, {}
    judged = run.process_reward.judge(rows, batch)
    return batch.replace(process_reward=judged.reward), judged.metrics


def uncorrected(batch: TrainBatch) -> TrainBatch:
    """Rows of other arms with ``old_logp`` for the log-probs they were sampled with: no correction from another temperature, another
    model or a written answer to the policy is intended, it is what pulls the policy there (arXiv:2510.08141)."""
    if batch.old_logp is None or batch.rollout_logp is None:
        return batch
    own = (batch.arm == ARM_POLICY)[:, None]
    return batch.replace(rollout_logp=torch.where(own, batch.rollout_logp, batch.old_logp))


def trained(rows: TokenRows, sampled: TrainBatch, batch: TrainBatch) -> tuple[TokenRows, TrainBatch, TrainBatch]:
    """Without the reference model's rows: once the advantages are there, they have given all they have."""
    if not bool((batch.arm == ARM_REFERENCE).any()):
        return rows, sampled, batch
    kept = torch.nonzero(batch.arm != ARM_REFERENCE).flatten()
    rows = rows.rows(kept)
    width = max(map(len, rows.completions))
    return rows, sampled.rows(kept, width), batch.rows(kept, width)


def weigh(run: Run, batch: TrainBatch) -> TrainBatch:
    """Advantages, then the controls in the recipe's order, over the whole step."""
    batch = assign(batch, run.advantage)
    for control in run.step_controls:
        batch = apply(batch, control)
    return batch


def report(
    run: Run,
    step: int,
    produced: Produced,
    sampled: TrainBatch,
    batch: TrainBatch,
    update: UpdateStats,
    lr: float,
    seconds: dict[str, float],
    others: dict[str, float],
) -> dict[str, float]:
    """One step's numbers to every sink, one line to the terminal. sampled: the batch before any control touched it. others: what
    the sync, the process reward model and a pass ahead of the updates say."""
    logp = update.logp if batch.old_logp is None or run.recipe.rollout.trust_logp else batch.old_logp
    entropy = entropy_of(batch, update)
    completions, arms = completion_metrics(produced.groups), arm_metrics(produced.groups)
    tokens = sum(value for name, value in (completions | arms).items() if name.startswith("rollout/") and name.endswith("tokens"))
    metrics = {
        **completions,
        **arms,
        **own_step_metrics(batch, logp, entropy, sampled.mask),
        **update.metrics,
        **coefficients(run),
        **others,
        "learner/lr": lr,
        "learner/version": run.learner.version,
        "learner/idle_rows": update.idle_rows,
        "learner/trained_rows": update.trained_rows,
        "learner/trained_tokens": update.trained_tokens,
        "learner/skipped_updates": update.skipped_updates,
        "rollout/generated_groups": produced.generated_groups,
        "rollout/rounds": produced.rounds,
        **timing(seconds, tokens=tokens),
    }
    metrics |= run.law.step(metrics)
    note = why_zero(batch, lr) if update.metrics["learner/grad_norm"] == 0 or lr == 0 else None
    run.reporter.step(step, metrics, produced.groups, note)
    if (warning := run.mismatch.check(step, metrics)) is not None:
        run.reporter.warn(warning)
    if (said := run.law.message()) is not None:
        run.reporter.message(said)
    return metrics


def entropy_of(batch: TrainBatch, update: UpdateStats) -> Tensor:
    """(B, T) nats, of the policy that sampled."""
    return update.entropy if batch.old_entropy is None else batch.old_entropy


def coefficients(run: Run) -> dict[str, float]:
    """What the controllers gave this step, as metrics."""
    found: dict[str, float] = {}
    for term, controller in run.controllers:
        found |= {f"loss/{term}_coefficient": controller(), **{f"loss/{term}_{key}": value for key, value in controller.inputs().items()}}
    return found


def observe(run: Run, metrics: Mapping[str, float]) -> None:
    """Whatever learns from a step's numbers takes them in, in time for the step's checkpoint. Every rank has the same ones."""
    run.producer.observe(metrics["learner/entropy_mean"])
    run.producer.order.observe(metrics)
    for _, controller in run.controllers:
        controller.observe(metrics)


def evaluate(run: Run) -> Evaluation | None:
    """Held-out pass@k with the weights as they are, one more point of the law; None if the recipe has no held-out prompts."""
    result = evaluate_policy(run.evaluator, run.engine, run.sync, run.learner)
    if result is not None:
        run.law.evaluation(result.metrics())
        run.reporter.once(result.note)
    return result
