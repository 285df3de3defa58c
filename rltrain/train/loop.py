"""The part of a run that every workflow shares: resuming, evaluations, checkpoints, stopping, finishing.

A workflow such as ``train/online.py`` is a ``for`` over the step numbers of ``TrainingRun.steps``, which
evaluates and writes checkpoints between the steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NoReturn

from rltrain.checkpoint.random_state import restore_random_state
from rltrain.checkpoint.run_state import RunState
from rltrain.config.schema import AnyRecipe
from rltrain.learner.trained_model import ModelOwner
from rltrain.protocols import WorkersGone
from rltrain.report.reporter import Reporter
from rltrain.train.memory import is_gpu_out_of_memory
from rltrain.train.profiling import PROFILE_FOLDER, profile_step
from rltrain.train.saving import (
    EvaluationHistory,
    EvaluationResult,
    ModelWriter,
    Stopped,
    WithoutWorkers,
)

__all__ = ["Clock", "TrainingRun", "timing_metrics"]


@dataclass(frozen=True, kw_only=True)
class TrainingRun(ABC):
    """The parts that every run has. A workflow loops over ``steps()`` and ends with ``finish()``."""

    recipe: AnyRecipe
    total_steps: int
    learner: ModelOwner
    reporter: Reporter
    writer: ModelWriter
    resumed: RunState | None  # the state to continue from; None in a new run
    should_stop: Callable[[], bool]  # whether this process was asked to end after the current step
    history: EvaluationHistory = field(default_factory=EvaluationHistory)

    @abstractmethod
    def evaluate(self) -> EvaluationResult | None:
        """Measures the current weights on held-out data; None where the recipe has none."""

    @abstractmethod
    def close(self) -> None:
        """Ends engines, processes and trackers."""

    def steps(self) -> Iterator[int]:
        """Yields the number of each step that is still to be taken; the first step of a run is 1.

        Evaluates and writes checkpoints between the steps, as often as the recipe says. Raises Stopped, after
        a checkpoint, once any rank was asked to stop.
        """
        done = self._resume()
        if done == 0 and self.recipe.eval.at_start:
            self._evaluate_and_report(0)

        for step in range(done + 1, self.total_steps + 1):
            with self._profile(step):
                yield step
            if is_due(step, self.recipe.eval.every):
                self._evaluate_and_report(step)
            is_stopping = self.learner.any_rank(self.should_stop())
            if is_stopping or is_due(step, self.recipe.checkpoint.every):
                checkpoint = self.writer.checkpoint(step, self.history)
                if is_stopping:
                    self.writer.wait()
                    raise Stopped(step, checkpoint)

    def finish(self) -> Path:
        """Evaluates a last time and writes the finished model; returns its folder."""
        if not is_due(self.total_steps, self.recipe.eval.every):
            self._evaluate_and_report(self.total_steps)
        return self.writer.final(self.total_steps, self.history)

    def leave_without_workers(self, step: int, error: WorkersGone) -> NoReturn:
        """Saves the present state, that after ``step``, and ends the run. Every rank calls."""
        checkpoint = self.writer.folder.checkpoint(step) if step > 0 else None
        if checkpoint is not None and not self.learner.any_rank(checkpoint.exists()):
            checkpoint = self.writer.checkpoint(step, self.history)
        self.writer.wait()
        raise WithoutWorkers(step, checkpoint, str(error)) from error

    def _profile(self, step: int) -> AbstractContextManager[object]:
        """Profiles the step where ``train.profile`` names it."""
        settings = self.recipe.train.profile
        if settings is None or step not in settings.steps:
            return nullcontext()
        return profile_step(self.writer.folder.path / PROFILE_FOLDER, step, self.learner.rank)

    def _resume(self) -> int:
        """Restores random generators and earlier evaluations; returns the number of steps already taken."""
        if self.resumed is None:
            return 0
        if self.learner.rank < len(self.resumed.random):
            restore_random_state(self.resumed.random[self.learner.rank])
        self.history.all[:] = self.resumed.evaluations
        return self.resumed.step

    def _evaluate_and_report(self, step: int) -> None:
        start = perf_counter()
        try:
            result = self.evaluate()
        except WorkersGone as error:
            self.leave_without_workers(step, error)
        if result is not None:
            metrics = {**result.metrics(), "time/eval": perf_counter() - start}
            self.reporter.evaluation(step, metrics, result.groups)
            self.history.add(result)


def is_due(step: int, every: int) -> bool:
    """Whether ``step`` is a multiple of ``every``; 0 means never."""
    return every > 0 and step % every == 0


class Clock:
    """Measures the wall-clock seconds of each phase of a step. seconds: phases that were measured before.

    An error of memory that runs out gets the phase as a note.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        except RuntimeError as error:
            if is_gpu_out_of_memory(error):
                error.add_note(phase)
            raise
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start


def timing_metrics(seconds: Mapping[str, float], **counts: float) -> dict[str, float]:
    """Seconds of each phase and of the whole step, and ``counts`` per second of the whole step."""
    total = sum(seconds.values())
    rates = {f"time/{name}_per_second": count / total for name, count in counts.items()}
    return {**{f"time/{name}": value for name, value in seconds.items()}, "time/step": total, **rates}
