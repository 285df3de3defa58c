"""Seconds of a step in closed form where samples are drawn while the policy is updated, and how GPUs are best
divided between the two.

In a push neither samples nor learns. Between two pushes both work, and the slower one decides: with a lag, on
the time in which all workers together draw a step's samples, the last one included; with a bound, in which no
worker waits for another, on the time that these samples take on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Split", "StepCost", "divide_gpus"]


@dataclass(frozen=True)
class StepCost:
    """Seconds. sampling: of the workers, for the samples of a step. learning: of the learner, with its passes
    before the update. push: of the weights, while both wait. overlaps: sampling and learning go on at once.
    """

    sampling: float
    learning: float
    push: float
    overlaps: bool

    @property
    def seconds(self) -> float:
        if self.overlaps:
            return max(self.sampling, self.learning) + self.push
        return self.sampling + self.learning + self.push

    @property
    def bottleneck(self) -> Literal["sampling", "learning"]:
        return "sampling" if self.sampling >= self.learning else "learning"


@dataclass(frozen=True)
class Split:
    """GPUs of the learner and of the workers, and what a step costs with them."""

    learner_gpus: int
    server_gpus: int
    cost: StepCost


def divide_gpus(
    total: int, unit: int, cost_of: Callable[[int, int], StepCost | None], *, most_learners: int | None = None
) -> Split | None:
    """The split of ``total`` GPUs with the shortest step; None: none fits. Of equal ones that with the fewest
    workers.

    unit: GPUs of a worker. cost_of: by GPUs of the learner and of the workers; None: that does not fit.
    most_learners: GPUs that the learner may have; those which are left over then do nothing.
    """
    best: Split | None = None
    for servers in range(unit, total, unit):
        learners = total - servers if most_learners is None else min(total - servers, most_learners)
        cost = cost_of(learners, servers)
        if cost is not None and (best is None or cost.seconds < best.cost.seconds):
            best = Split(learners, servers, cost)
    return best
