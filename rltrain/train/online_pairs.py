"""The loop of online preferences: take rollouts, judge, pair, update, push weights, report.

It is blind to which judge and loss run. A step samples from the policy as it is, so a previous iterate that
is renewed with every step is the policy that sampled (INPO); one that is kept for two steps is the centre of
both (Nash-MP).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rltrain.config.schema import OnlinePairsRecipe
from rltrain.learner.pair_learner import PREVIOUS, PairLearner, PairUpdates
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.report.metrics import completion_metrics, step_metrics
from rltrain.rollout.collate import collate
from rltrain.rollout.pairs.pairing import JudgedPairs, Pairing, pair_batch
from rltrain.rollout.source import Rollouts, RolloutSource
from rltrain.sync.colocated import Sync
from rltrain.train.evaluate import Evaluation, Evaluator
from rltrain.train.loop import Clock, TrainingRun, timing_metrics
from rltrain.train.mismatch import MismatchGuard
from rltrain.train.online import must_change_weights
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.preference import PairBatch

SAMPLED = frozenset({"logp", "entropy"})  # passes over everything sampled, at the sampling temperature


@dataclass(frozen=True, kw_only=True)
class PairRun(TrainingRun):
    """Everything that one run on sampled pairs is made of; ``build/online_pairs.py`` puts it together."""

    recipe: OnlinePairsRecipe
    learner: PairLearner
    source: RolloutSource
    sync: Sync
    evaluator: Evaluator | None
    pairing: Pairing
    objective: PreferenceObjective
    mismatch: MismatchGuard

    def push(self, *, expect_change: bool) -> dict[str, float]:
        """Gives the learner's weights to whatever samples, proved; metrics of the push."""
        learner = self.learner
        return self.sync.push(
            learner.weights, learner.version, expect_change=expect_change, norms=learner.weight_norms
        )

    def evaluate(self) -> Evaluation | None:
        """Held-out pass@k with the weights as they are."""
        if self.evaluator is None:
            return None
        result = self.evaluator.evaluate(self.source, self.learner.version)
        self.sync.verify_all(self.learner.weights)
        self.reporter.once(result.note)
        return result

    def close(self) -> None:
        self.source.close()
        self.reporter.close()


@dataclass(frozen=True)
class PairStep:
    """One step's completions, and the pairs that were made of them."""

    number: int
    rollouts: Rollouts
    rows: TokenRows  # of everything sampled
    sampled: TrainBatch
    logp: Tensor  # (B, T) nats, the policy's at the sampling temperature
    entropy: Tensor  # (B, T) nats
    judged: JudgedPairs


def train_pairs(run: PairRun) -> Path:
    """Takes every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError when the numbers are lost, and Stopped as ``TrainingRun.steps`` does.
    """
    run.push(expect_change=False)
    for number in run.steps():
        rollouts = run.source.take(number, run.learner.version)
        clock = Clock(rollouts.seconds)

        step = judge(run, number, rollouts, clock)
        with clock("annotate"):
            rows, batch = annotate_pairs(run, step)
        lr = run.learner.lr
        with clock("update"):
            update = run.learner.update_pairs(rows, batch, run.objective)
        with clock("sync"):
            pushed = run.push(expect_change=must_change_weights(update.metrics, lr))

        metrics = sample_metrics(step) | update.metrics | pushed | {"learner/lr": lr}
        run.source.observe(report_step(run, step, metrics, update, clock.seconds))
    return run.finish()


def judge(run: PairRun, number: int, rollouts: Rollouts, clock: Clock) -> PairStep:
    """The policy's own statistics of everything sampled, and the judge's verdicts on pairs of it."""
    with clock("annotate"):
        renew_previous_iterate(run, number)
        rows, sampled = collate(rollouts.groups)
        own = run.learner.annotate(rows, SAMPLED)
    with clock("judge"):
        judged = run.pairing(rollouts.groups, number)
    return PairStep(number, rollouts, rows, sampled, own["logp"], own["entropy"], judged)


def renew_previous_iterate(run: PairRun, number: int) -> None:
    """A previous iterate that outlives a step is a copy of the policy, renewed every
    ``train.previous_every`` steps.
    """
    every = run.recipe.train.previous_every
    if every > 1 and (number - 1) % every == 0:
        run.learner.keep_iterate(run.recipe.model)


def annotate_pairs(run: PairRun, step: PairStep) -> tuple[TokenRows, PairBatch]:
    """The pairs' rows and their batch, with the log-probs of frozen models that the loss needs.

    Where the previous iterate is the policy that sampled, at temperature 1, its log-probs are there already.
    """
    learner, needs, judged = run.learner, run.objective.needs, step.judged
    logps: dict[str, tuple[Tensor, Tensor]] = {}
    rows = judged.rows(step.rows)
    lengths = torch.tensor([len(completion) for completion in step.rows.completions])
    if len(judged) and "ref_logp" in needs:
        logps["ref_logp"] = _sides(learner.log_probs(rows, sides=2, frozen=learner.frozen["ref_logp"]))
    if len(judged) and PREVIOUS in needs:
        if PREVIOUS not in learner.frozen and run.recipe.rollout.temperature == 1:
            logps[PREVIOUS] = judged.picked(step.logp.sum(dim=1))
        else:
            logps[PREVIOUS] = _sides(learner.log_probs(rows, sides=2, frozen=learner.frozen.get(PREVIOUS)))
    return rows, pair_batch(judged, lengths, logps)


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def sample_metrics(step: PairStep) -> dict[str, float]:
    """Metrics of the samples and of the pairs.

    There are no advantages and no controls, so the masked share is 0.
    """
    metrics = step_metrics(step.sampled, step.logp, step.entropy)
    lengths = torch.tensor([len(completion) for completion in step.rows.completions])
    kept = {name: value for name, value in metrics.items() if not name.startswith("advantage/")}
    return kept | step.judged.metrics(lengths)


def report_step(
    run: PairRun, step: PairStep, metrics: dict[str, float], update: PairUpdates, seconds: dict[str, float]
) -> dict[str, float]:
    """The step's numbers, sent to every sink, and one line on the terminal."""
    completions = completion_metrics(step.rollouts.groups)
    metrics |= {
        **completions,
        "learner/version": run.learner.version,
        "learner/trained_tokens": update.tokens,
        "learner/skipped_updates": update.skipped,
        "rollout/generated_groups": step.rollouts.generated_groups,
        "rollout/rounds": step.rollouts.rounds,
        **timing_metrics(seconds, tokens=completions["rollout/tokens"], examples=metrics["pairs/count"]),
    }
    run.reporter.step(step.number, metrics, step.rollouts.groups, why_no_update(metrics))
    warning = run.mismatch.check(step.number, metrics)
    if warning is not None:
        run.reporter.warn(warning)
    return metrics


def why_no_update(metrics: dict[str, float]) -> str | None:
    """Why this step cannot move the weights; None when it can."""
    if metrics["pairs/count"] == 0:
        return "no pairs (every comparison a tie, or between equal answers)"
    if metrics["learner/lr"] == 0:
        return "lr 0"
    return "every pair's gradient is 0: the loss has saturated" if metrics["learner/grad_norm"] == 0 else None
