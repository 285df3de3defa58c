"""Where a loop's completions come from: one protocol, whoever samples them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from rltrain.types.samples import Prompt, Sampling, ScoredGroup

__all__ = ["Evaluates", "RolloutSource", "Rollouts"]


@dataclass(frozen=True)
class Rollouts:
    """The groups that one step trains on: those of all ranks, equal on every rank."""

    groups: tuple[ScoredGroup, ...]
    generated_groups: int  # before dynamic sampling dropped any
    rounds: int
    correct_counts: tuple[
        int, ...
    ]  # correct completions of each generated group; empty where no reward reports correctness
    seconds: dict[str, float]  # wall-clock of this rank by phase: "rollout", "reward", "sync"
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # of sources and of the adaptive temperature, for controls and logs


class Evaluates(Protocol):
    """Samples and grades held-out prompts."""

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        """``sampling.n`` graded completions of each prompt by the policy of ``version``, equal on every rank.

        occasion: what they are graded for, in words, for logs.
        """
        ...


class RolloutSource(Evaluates, Protocol):
    """Graded completions, step by step.

    Every rank calls every method; nothing assumes that a rank samples a share.
    """

    def take(self, step: int, version: int) -> Rollouts:
        """The rollouts of ``step``, sampled by the policy of ``version``, whose weights are proved before
        this returns.

        Raises WeightMismatchError if an engine sampled with other weights.
        """
        ...

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        """Tells the source how the step went; whatever adapts to it does so before the next ``take``.

        entropy: (B, T) nats, of the policy that sampled. sampled: (B, T) bool, the tokens that the policy
        wrote itself.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next ``take`` depends on besides the weights, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``. Raises ValueError for the state of other data."""
        ...

    def close(self) -> None:
        """Releases engines and processes."""
        ...
