"""The offline loop: take the next judged examples, update the model once, report.

The examples come from a data set: pairs of a chosen and a rejected completion, or completions with a label.
The loop does not know which loss runs: the recipe names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rltrain.config.schema import OfflineRecipe
from rltrain.learner.preference_learner import ExampleUpdate, PreferenceLearner
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.train.evaluate_preferences import PreferenceEvaluation, PreferenceEvaluator
from rltrain.train.examples import ExampleOrder, Examples
from rltrain.train.loop import TrainingRun


@dataclass(frozen=True, kw_only=True)
class OfflineRun(TrainingRun):
    """The parts of one offline run; ``build/offline.py`` assembles them."""

    recipe: OfflineRecipe
    learner: PreferenceLearner
    examples: Examples
    order: ExampleOrder
    objective: PreferenceObjective
    evaluator: PreferenceEvaluator | None

    def evaluate(self) -> PreferenceEvaluation | None:
        """Scores the held-out examples with the current weights."""
        return None if self.evaluator is None else self.evaluator.evaluate()

    def close(self) -> None:
        self.reporter.close()


def train_offline(run: OfflineRun) -> Path:
    """Trains the model for every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError after too many updates in a row without a finite loss and gradient, and Stopped as
    ``TrainingRun.steps`` does.
    """
    for number in run.steps():
        start = perf_counter()
        lr = run.learner.lr
        chosen = run.order.next()
        rows, batch, mismatched = run.examples.batch(chosen, number)
        degraded = run.examples.degraded
        versions = None if degraded is None else degraded.draw(chosen, number)
        update = run.learner.update_examples(rows, batch, run.objective, mismatched, versions)
        report_step(run, number, update, lr, perf_counter() - start)
    return run.finish()


def report_step(run: OfflineRun, number: int, update: ExampleUpdate, lr: float, seconds: float) -> None:
    """Sends the step's metrics to every sink and prints one line on the terminal."""
    metrics = {
        **update.metrics,
        "learner/lr": lr,
        "learner/version": run.learner.version,
        "learner/trained_tokens": update.tokens,
        "learner/skipped_updates": 0 if update.stepped else 1,
        "learner/shared_prompts": float(update.shared),
        "learner/epoch": run.order.epochs,
        "time/step": seconds,
        "time/examples_per_second": run.order.per_step / seconds,
    }
    run.reporter.step(number, metrics, (), why_no_update(metrics))


def why_no_update(metrics: Mapping[str, float]) -> str | None:
    """Why this step cannot move the weights; None when it can."""
    if metrics["learner/lr"] == 0:
        return "the learning rate is 0"
    if metrics["learner/grad_norm"] == 0:
        return "every example's gradient is 0: the loss has saturated"
    return None
