"""The protocol by which a training loop gets its completions, independent of what samples them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from rltrain.types.samples import Prompt, Sampling, ScoredGroup

__all__ = ["EvaluationSource", "PromptedSource", "RolloutSource", "Rollouts"]


@dataclass(frozen=True)
class Rollouts:
    """The groups that one step trains on, from all ranks; equal on every rank."""

    groups: tuple[ScoredGroup, ...]
    generated_groups: int  # before dynamic sampling dropped any
    rounds: int  # of dynamic sampling
    # correct completions of each generated group; empty where no reward reports correctness
    correct_counts: tuple[int, ...]
    seconds: dict[str, float]  # wall-clock of this rank by phase: "rollout", "reward", "sync"
    # of extra sample sources and of the adaptive temperature, for controls and logs; names with a slash are
    # whole metrics, for logs only
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def control_metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics.items() if "/" not in name}

    @property
    def logged_metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics.items() if "/" in name}


class EvaluationSource(Protocol):
    """Samples and grades held-out prompts."""

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        """``sampling.n`` graded completions of each prompt by the policy of ``version``, equal on every rank.

        occasion: the purpose of the grading, in words, for logs.
        """
        ...


class RolloutSource(EvaluationSource, Protocol):
    """Graded completions, step by step.

    Every rank calls every method. An implementation need not divide the sampling among the ranks.
    """

    def take(self, step: int, version: int) -> Rollouts:
        """The rollouts of ``step``, sampled by the policy of ``version``.

        Before it returns it verifies that the engine held that policy's weights; raises WeightMismatchError
        if an engine sampled with others.
        """
        ...

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        """Tells the source the step's numbers, so that it adapts before the next ``take``.

        entropy: (B, T) nats, of the policy that sampled. sampled: (B, T) bool, the tokens that the policy
        wrote itself.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state on which the next ``take`` depends, besides the weights, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``. Raises ValueError for the state of other data."""
        ...

    def close(self) -> None:
        """Releases engines and processes."""
        ...


class PromptedSource(RolloutSource, Protocol):
    """A rollout source whose parts other sources can add to."""

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        """Those that steps are drawn from; None: it draws no prompts."""
        ...

    def settle(self) -> None:
        """Returns when nothing is sampled any more, so that the weights may change."""
        ...

    def release_memory(self) -> None:
        """Leaves the device to the learner: the engine's weights are gone until the next push."""
        ...
