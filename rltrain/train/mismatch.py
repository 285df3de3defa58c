"""How far the engine's log-probs may be from the learner's before a run warns, and before it stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rltrain.report.metrics import WORKER_MISMATCH
from rltrain.seeds import stable_hash

_RESCORED = 0.01  # share of each worker's completions


class MismatchError(RuntimeError):
    """Engine and learner disagree about the probabilities of the samples, so the loss would be that of a
    policy other than the one that sampled.
    """


@dataclass
class MismatchGuard:
    """Thresholds in nats for a step's mean |learner - engine log-prob|; ``patience`` steps in a row above
    ``stop`` end the run.
    """

    warn: float
    stop: float
    patience: int
    _steps_above: int = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning if the step's mismatch is above ``warn``, else None.

        Raises MismatchError. A mismatch that is not a number counts as above every threshold.
        """
        value = metrics["rollout/mismatch_abs"]
        self._steps_above = 0 if value <= self.stop else self._steps_above + 1
        if self._steps_above >= self.patience:
            raise MismatchError(
                f"step {step}: mean |learner - engine log-prob| is {value:.3g} nats, above "
                f"rollout.mismatch_stop {self.stop:g} for {self._steps_above} step(s) in a row. The compared "
                "weights are equal, so look at, in this order: log-probs of another temperature than "
                "rollout.temperature (or before it was applied); a prefix cache that holds keys of older "
                "weights; an engine of lower precision or with another attention kernel than the learner; "
                "positions or templates that differ. `rltrain doctor` measures it at learning rate 0"
            )
        if not value <= self.warn:
            return (
                f"mean |learner - engine log-prob| is {value:.3g} nats, above rollout.mismatch_warn "
                f"{self.warn:g} (the run stops after {self.patience} steps above {self.stop:g})"
            )
        return self._worker_warning(metrics)

    def _worker_warning(self, metrics: Mapping[str, float]) -> str | None:
        """About workers that differ so much from the learner, though all together do not."""
        wrong = [
            f"{name.removeprefix(WORKER_MISMATCH)} {value:.3g}"
            for name, value in metrics.items()
            if name.startswith(WORKER_MISMATCH) and not value <= self.warn
        ]
        if not wrong:
            return None
        return (
            "mean |learner - engine log-prob| of single workers in nats, above rollout.mismatch_warn "
            f"{self.warn:g}: {', '.join(wrong)}; the others' samples hide it from the mean. Start these "
            "workers again"
        )


def find_workers(workers: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each worker, given every row's; without rows that name none."""
    rows: dict[str, list[int]] = {}
    for row, worker in enumerate(workers):
        if worker:
            rows.setdefault(worker, []).append(row)
    return dict(sorted(rows.items()))


def choose_rows(rows: Mapping[str, Sequence[int]], seed: int) -> dict[str, list[int]]:
    """The rows of each worker that the learner scores again: a seeded share, at least one."""
    return {
        worker: sorted(
            sorted(places, key=lambda row: stable_hash(seed, row))[: max(1, int(len(places) * _RESCORED))]
        )
        for worker, places in rows.items()
    }
