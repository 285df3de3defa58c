"""The offline loop: the next judged examples, one optimizer update, report.

It is blind to which loss runs.
"""

from __future__ import annotations

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
    """Everything that one offline run is made of; ``build/offline.py`` puts it together."""

    recipe: OfflineRecipe
    learner: PreferenceLearner
    examples: Examples
    order: ExampleOrder
    objective: PreferenceObjective
    evaluator: PreferenceEvaluator | None

    def evaluate(self) -> PreferenceEvaluation | None:
        return None if self.evaluator is None else self.evaluator.evaluate()

    def close(self) -> None:
        self.reporter.close()


def train_offline(run: OfflineRun) -> Path:
    """Takes every step of the recipe; returns the folder of the finished model.

    Raises NonFiniteError when the numbers are lost, and Stopped as ``TrainingRun.steps`` does.
    """
    for number in run.steps():
        started, lr = perf_counter(), run.learner.lr
        rows, batch, mismatched = run.examples.batch(run.order.next(), number)
        update = run.learner.update_examples(rows, batch, run.objective, mismatched)
        report_step(run, number, update, lr, perf_counter() - started)
    return run.finish()


def report_step(run: OfflineRun, number: int, update: ExampleUpdate, lr: float, seconds: float) -> None:
    """The step's numbers, sent to every sink, and one line on the terminal."""
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
    note = None
    if lr == 0:
        note = "the learning rate is 0"
    elif update.metrics["learner/grad_norm"] == 0:
        note = "every example's gradient is 0: the loss has saturated"
    run.reporter.step(number, metrics, (), note)
