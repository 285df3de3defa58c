"""The loop of online preferences: sample, judge, pair, update, sync, report. One page, blind to which judge and loss run.

A step samples from the policy as it is, so a frozen previous iterate that is renewed with every step is the policy that sampled
(INPO); one that stays for two is the centre from which Nash-MP takes both of its steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rltrain.config.schema import PairRecipe
from rltrain.learner.pair_learner import PREVIOUS, PairLearner, PairUpdates
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.protocols import RolloutEngine
from rltrain.report.metrics import completion_metrics, step_metrics
from rltrain.rollout.collate import collate
from rltrain.rollout.pairing import JudgedPairs, Pairing, pair_batch
from rltrain.rollout.producer import Produced, Producer
from rltrain.sync.in_process import Sync
from rltrain.train.course import Clock, Course, timing, walk
from rltrain.train.evaluate import Evaluation, Evaluator, evaluate_policy
from rltrain.train.mismatch import MismatchGuard
from rltrain.train.online import moves
from rltrain.types import PairBatch, TokenRows, TrainBatch

SAMPLED = frozenset({"logp", "entropy"})  # taken of everything sampled, at the sampling temperature


@dataclass(frozen=True)
class PairRun(Course):
    """Everything one run on sampled pairs is made of; ``build_pairs.py`` puts it together."""

    recipe: PairRecipe
    learner: PairLearner
    engine: RolloutEngine
    sync: Sync
    producer: Producer
    evaluator: Evaluator | None
    pairing: Pairing
    objective: PreferenceObjective
    mismatch: MismatchGuard


def train_pairs(run: PairRun) -> Path:
    """Run every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError when the numbers are lost, Stopped as ``walk`` does.
    """
    run.sync.push(run.learner.weights(), run.learner.version, expect_change=False)
    return walk(run, run.recipe.train.steps, partial(evaluate, run), partial(take, run))


def evaluate(run: PairRun) -> Evaluation | None:
    """Held-out pass@k with the weights as they are; None if the recipe has no held-out prompts."""
    result = evaluate_policy(run.evaluator, run.engine, run.sync, run.learner)
    if result is not None:
        run.reporter.once(result.note)
    return result


def take(run: PairRun, step: int) -> None:
    """One step: sample, judge and pair, update, give the engine the new weights, report."""
    learner, clock = run.learner, Clock()
    produced = run.producer.next(step, learner.version)
    with clock("sync"):
        run.sync.verify()
    run.engine.sleep()  # on GPU the learner takes the memory
    with clock("annotate"):
        renew_iterate(run, step)
        everything, sampled = collate(produced.groups)
        own = learner.annotate(everything, SAMPLED)
    with clock("judge"):
        judged = run.pairing(produced.groups, step)
    with clock("annotate"):
        rows, batch = annotated(run, judged, everything, own["logp"])
    lr = learner.lr
    with clock("update"):
        update = learner.update_pairs(rows, batch, run.objective)
    with clock("sync"):
        run.engine.wake()
        synced = run.sync.push(learner.weights(), learner.version, expect_change=moves(update.metrics, lr))
    metrics = numbers(sampled, own, judged, everything) | update.metrics | synced | {"learner/lr": lr}
    report(run, step, produced, metrics, update, produced.seconds | clock.seconds)
    run.producer.order.observe(metrics)


def renew_iterate(run: PairRun, step: int) -> None:
    """Where the previous iterate outlives a step, it is a copy, made anew every so many steps."""
    every = run.recipe.train.previous_every
    if every > 1 and (step - 1) % every == 0:
        run.learner.keep_iterate(run.recipe.model)


def annotated(run: PairRun, judged: JudgedPairs, everything: TokenRows, logp: Tensor) -> tuple[TokenRows, PairBatch]:
    """The pairs' rows and their batch, with the frozen models' log-probs that the loss needs.

    logp: (B, T) nats of everything sampled, the policy's at the sampling temperature; at temperature 1 it is the previous
    iterate's where that is the policy itself, and no pass is needed.
    """
    learner, needs, facts = run.learner, run.objective.needs, dict[str, tuple[Tensor, Tensor]]()
    rows, lengths = judged.rows(everything), torch.tensor([len(one) for one in everything.completions])
    if len(judged) and "ref_logp" in needs:
        facts["ref_logp"] = _halves(learner.log_probs(rows, sides=2, policy=learner.frozen["ref_logp"]))
    if len(judged) and PREVIOUS in needs:
        if PREVIOUS not in learner.frozen and run.recipe.rollout.temperature == 1:
            facts[PREVIOUS] = judged.picked(logp.sum(dim=1))
        else:
            facts[PREVIOUS] = _halves(learner.log_probs(rows, sides=2, policy=learner.frozen.get(PREVIOUS)))
    return rows, pair_batch(judged, lengths, facts)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def numbers(sampled: TrainBatch, own: dict[str, Tensor], judged: JudgedPairs, everything: TokenRows) -> dict[str, float]:
    """What the step's samples and pairs say of themselves. There are no advantages and no controls: the masked share, which stands
    beside the mismatch in every run, is 0."""
    found = step_metrics(sampled, own["logp"], own["entropy"])
    lengths = torch.tensor([len(one) for one in everything.completions])
    return {name: value for name, value in found.items() if not name.startswith("advantage/")} | judged.metrics(lengths)


def report(run: PairRun, step: int, produced: Produced, metrics: dict[str, float], update: PairUpdates, seconds: dict[str, float]) -> None:
    """One step's numbers to every sink, one line to the terminal."""
    completions = completion_metrics(produced.groups)
    metrics |= {
        **completions,
        "learner/version": run.learner.version,
        "learner/trained_tokens": update.tokens,
        "learner/skipped_updates": update.skipped,
        "rollout/generated_groups": produced.generated_groups,
        "rollout/rounds": produced.rounds,
        **timing(seconds, tokens=completions["rollout/tokens"], examples=metrics["pairs/count"]),
    }
    run.reporter.step(step, metrics, produced.groups, why_nothing(metrics))
    if (warning := run.mismatch.check(step, metrics)) is not None:
        run.reporter.warn(warning)


def why_nothing(metrics: dict[str, float]) -> str | None:
    """Why this step cannot move the weights; None when it can."""
    if metrics["pairs/count"] == 0:
        return "no pairs (every comparison a tie, or between equal answers)"
    if metrics["learner/lr"] == 0:
        return "lr 0"
    return "every pair's gradient is 0: the loss has saturated" if metrics["learner/grad_norm"] == 0 else None
