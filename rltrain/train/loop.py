"""What surrounds the steps of every run: resuming, evaluations, checkpoints, stopping and finishing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from rltrain.checkpoint.random_state import restore_random_state
from rltrain.checkpoint.run_state import RunState
from rltrain.config.schema import AnyRecipe
from rltrain.learner.trained_model import ModelOwner
from rltrain.report.reporter import Reporter
from rltrain.train.saving import EvaluationHistory, EvaluationResult, ModelWriter, Stopped

__all__ = ["Clock", "TrainingRun", "timing_metrics"]


@dataclass(frozen=True, kw_only=True)
class TrainingRun(ABC):
    """What every run has. A workflow is a loop over ``steps()`` that ends with ``finish()``."""

    recipe: AnyRecipe
    total_steps: int
    learner: ModelOwner
    reporter: Reporter
    writer: ModelWriter
    resumed: RunState | None  # the state to continue from; None: the run starts
    should_stop: Callable[[], bool]  # whether this process was asked to end after the current step
    history: EvaluationHistory = field(default_factory=EvaluationHistory)

    @abstractmethod
    def evaluate(self) -> EvaluationResult | None:
        """Measures the weights as they are; None where the recipe holds nothing out."""

    @abstractmethod
    def close(self) -> None:
        """Ends engines, processes and trackers."""

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, from 1.

        Between them come the evaluations and checkpoints that the recipe asks for. Raises Stopped, after a
        checkpoint, once any rank was asked to stop.
        """
        done = self._resume()
        if done == 0 and self.recipe.eval.at_start:
            self._measure(0)
        for step in range(done + 1, self.total_steps + 1):
            yield step
            if is_due(step, self.recipe.eval.every):
                self._measure(step)
            stopping = self.learner.any_rank(self.should_stop())
            if stopping or is_due(step, self.recipe.checkpoint.every):
                checkpoint = self.writer.checkpoint(step, self.history)
                if stopping:
                    raise Stopped(step, checkpoint)

    def finish(self) -> Path:
        """The last evaluation, and the folder of the finished model."""
        if not is_due(self.total_steps, self.recipe.eval.every):
            self._measure(self.total_steps)
        return self.writer.final(self.total_steps, self.history)

    def _resume(self) -> int:
        """Steps taken so far; random generators and evaluations continue from there."""
        if self.resumed is None:
            return 0
        if self.learner.rank < len(self.resumed.random):
            restore_random_state(self.resumed.random[self.learner.rank])
        self.history.all[:] = self.resumed.evaluations
        return self.resumed.step

    def _measure(self, step: int) -> None:
        started = perf_counter()
        result = self.evaluate()
        if result is not None:
            self.reporter.evaluation(step, {**result.metrics(), "time/eval": perf_counter() - started})
            self.history.add(result)


def is_due(step: int, every: int) -> bool:
    """Whether ``step`` is a multiple of ``every``; 0 means never."""
    return every > 0 and step % every == 0


class Clock:
    """Wall-clock seconds per phase of one step. seconds: what was measured elsewhere."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - started


def timing_metrics(seconds: Mapping[str, float], **counts: float) -> dict[str, float]:
    """Seconds of each phase and of the whole step, and ``counts`` per second of the whole step."""
    total = sum(seconds.values())
    rates = {f"time/{name}_per_second": count / total for name, count in counts.items()}
    return {**{f"time/{name}": value for name, value in seconds.items()}, "time/step": total, **rates}
