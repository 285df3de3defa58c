"""The loop of online preferences: sample, judge, pair, update, push the weights, report.

In each step the rollout source returns completions of the current policy; a judge compares completions of the
same prompt; the comparisons become pairs of a chosen and a rejected completion; the learner updates the
policy with a preference loss on the pairs; the engine gets the new weights.

The loop does not know which judge and loss run: the recipe names them. Some losses compare the policy with a
previous iterate of itself. One that is renewed in every step is the policy that sampled (INPO); one that is
kept for two steps is the centre of both (Nash-MP).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rltrain.config.schema import OnlinePairsRecipe
from rltrain.learner.pair_learner import PREVIOUS, PairLearner, PairUpdates
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.needs import REF_LOGP
from rltrain.report.metrics import completion_metrics, step_metrics, worker_metrics
from rltrain.rollout.collate import collate
from rltrain.rollout.pairs.pairing import JudgedPairs, Pairing, pair_batch
from rltrain.rollout.source import Rollouts
from rltrain.train.loop import Clock, timing_metrics
from rltrain.train.mismatch import MismatchGuard, find_workers
from rltrain.train.online import must_change_weights, row_workers
from rltrain.train.sampled_run import SampledRun
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.preference import PairBatch

# statistics of every sampled completion, at the sampling temperature
SAMPLE_STATISTICS = frozenset({"logp", "entropy"})


@dataclass(frozen=True, kw_only=True)
class PairRun(SampledRun):
    """The parts of one run on sampled pairs; ``build/online_pairs.py`` assembles them."""

    recipe: OnlinePairsRecipe
    learner: PairLearner
    pairing: Pairing
    objective: PreferenceObjective
    mismatch: MismatchGuard


@dataclass(frozen=True)
class PairStep:
    """One step's completions, and the pairs made from them.

    Row i of ``rows``, ``sampled``, ``logp`` and ``entropy`` is the same completion.
    """

    number: int
    rollouts: Rollouts
    rows: TokenRows
    sampled: TrainBatch
    logp: Tensor  # (B, T) nats, of the policy that sampled, at the sampling temperature
    entropy: Tensor  # (B, T) nats, of the same distribution
    judged: JudgedPairs


def train_pairs(run: PairRun) -> Path:
    """Trains the policy for every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError after too many updates in a row without a finite loss and gradient, and Stopped as
    ``TrainingRun.steps`` does.
    """
    run.push(expect_change=False)
    for number in run.steps():
        rollouts = run.take(number)
        clock = Clock(rollouts.seconds)

        step = judge_step(run, number, rollouts, clock)
        with clock("annotate"):
            rows, batch = annotate_pairs(run, step)
        lr = run.learner.lr
        with clock("update"):
            update = run.learner.update_pairs(rows, batch, run.objective)
        with clock("sync"):
            push_metrics = run.push(expect_change=must_change_weights(update.metrics, lr))

        metrics = sample_metrics(step) | update.metrics | push_metrics | {"learner/lr": lr}
        metrics = report_step(run, step, metrics, update, clock.seconds)
        run.source.observe(metrics)
    return run.finish()


# judge and annotate -----------------------------------------------------------------------------------------


def judge_step(run: PairRun, number: int, rollouts: Rollouts, clock: Clock) -> PairStep:
    """Computes the policy's statistics of every completion, and lets the judge make pairs of completions."""
    with clock("annotate"):
        renew_previous_iterate(run, number)
        rows, sampled = collate(rollouts.groups)
        statistics = run.learner.annotate(rows, SAMPLE_STATISTICS)
    with clock("judge"):
        judged = run.pairing(rollouts.groups, number)
    return PairStep(number, rollouts, rows, sampled, statistics["logp"], statistics["entropy"], judged)


def renew_previous_iterate(run: PairRun, number: int) -> None:
    """Copies the policy to the previous iterate every ``train.previous_every`` steps.

    An iterate of a single step needs no copy: it is the policy that sampled.
    """
    every = run.recipe.train.previous_every
    if every > 1 and (number - 1) % every == 0:
        run.learner.keep_iterate(run.recipe.model)


def annotate_pairs(run: PairRun, step: PairStep) -> tuple[TokenRows, PairBatch]:
    """The rows of the pairs and their batch, with the log-probs of frozen models that the loss needs.

    Where the previous iterate is the policy that sampled, at temperature 1, its log-probs are known already.
    """
    learner = run.learner
    needs = run.objective.needs
    judged = step.judged
    rows = judged.rows(step.rows)

    logps: dict[str, tuple[Tensor, Tensor]] = {}
    if len(judged) and REF_LOGP in needs:
        logps["ref_logp"] = split_sides(learner.log_probs(rows, sides=2, frozen=learner.frozen["ref_logp"]))
    if len(judged) and PREVIOUS in needs:
        if PREVIOUS not in learner.frozen and run.recipe.rollout.temperature == 1:
            logps[PREVIOUS] = judged.select_sides(step.logp.sum(dim=1))
        else:
            previous = learner.frozen.get(PREVIOUS)
            logps[PREVIOUS] = split_sides(learner.log_probs(rows, sides=2, frozen=previous))
    return rows, pair_batch(judged, completion_lengths(step), logps)


def split_sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """(values of the chosen completions, values of the rejected): the halves of ``values``."""
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def completion_lengths(step: PairStep) -> Tensor:
    """(B,) tokens of each sampled completion."""
    return torch.tensor([len(completion) for completion in step.rows.completions])


# report -----------------------------------------------------------------------------------------------------


def sample_metrics(step: PairStep) -> dict[str, float]:
    """Metrics of the samples, of each worker that wrote some, and of the pairs.

    There are no advantages and no controls, so the masked share is 0.
    """
    metrics = step_metrics(step.sampled, step.logp, step.entropy)
    if step.sampled.rollout_logp is not None:
        workers = find_workers(row_workers(step.rollouts.groups))
        metrics |= worker_metrics(workers, step.logp, step.sampled.rollout_logp, step.sampled.mask)
    kept = {name: value for name, value in metrics.items() if not name.startswith("advantage/")}
    return kept | step.judged.metrics(completion_lengths(step))


def report_step(
    run: PairRun, step: PairStep, metrics: dict[str, float], update: PairUpdates, seconds: dict[str, float]
) -> dict[str, float]:
    """Sends the step's metrics to every sink and prints one line on the terminal; returns the metrics."""
    completions = completion_metrics(step.rollouts.groups)
    metrics |= {
        **completions,
        "learner/version": run.learner.version,
        "learner/trained_tokens": update.tokens,
        "learner/skipped_updates": update.skipped,
        "rollout/generated_groups": step.rollouts.generated_groups,
        "rollout/rounds": step.rollouts.rounds,
        **step.rollouts.logged_metrics,
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
    if metrics["learner/grad_norm"] == 0:
        return "every pair's gradient is 0: the loss has saturated"
    return None
