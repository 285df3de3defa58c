"""The interfaces of adapters. A contract suite for each (``tests/contracts/``) runs on every implementation.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from rltrain.types.samples import Answer, PolicyVersion, Request

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rltrain.tensor_ops import Fingerprint


class EngineState(Enum):
    """ASLEEP -> MAPPED -> LOADED -> SERVING.

    Only an engine that has loaded version v samples for version v.
    """

    ASLEEP = "asleep"  # no weights on the device
    MAPPED = "mapped"  # memory is allocated; its contents are no version's weights
    LOADED = "loaded"  # holds the weights of `version`
    SERVING = "serving"  # has sampled with them


class WrongVersionError(RuntimeError):
    """An engine was asked to sample for a policy version whose weights it does not hold."""


class WorkersGone(RuntimeError):
    """No worker samples any more, and none has come back in time.

    The policy and everything that the next step depends on are whole: the run saves them and ends, and the
    same command goes on when there are workers again.
    """


class Sampler(Protocol):
    """Writes completions. ``rollout.groups.sample_groups`` collects them into whole groups."""

    @property
    def name(self) -> str:
        """The engine's name in messages: ``rollout.engine`` of the recipe."""
        ...

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """One answer per request, in any order; an implementation may yield all of them at the end.

        policy: the version of the weights that must sample every token. Log-probs are of the distribution
        sampled from (temperature included, float32). Equal (weights, prompt id, sampling, sample index) give
        equal tokens on one machine, up to floating-point ties, whatever the other requests are and however a
        group is cut into requests. Raises, at the call, WrongVersionError where the engine does not hold
        ``policy``, and ValueError where a prompt plus ``max_tokens`` does not fit the model.
        """
        ...

    def close(self) -> None:
        """Release all resources; it is not used again. A second call does nothing."""
        ...


class WeightTarget(Protocol):
    """Takes the learner's weights and can prove to ``sync/`` that it multiplies with them."""

    state: EngineState
    version: PolicyVersion | None  # of the weights it holds; None before the first load
    dtype: torch.dtype  # of the weights it holds; loading rounds to it
    # Relative rounding error of its fingerprints; 0 would mean the same sums in the same order.
    fingerprint_rtol: float

    @property
    def name(self) -> str:
        """The engine's name in messages: ``rollout.engine`` of the recipe."""
        ...

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """Take the learner's weights as ``version``, and drop every cache computed with older ones.

        stream: Hugging Face names, full tensors. It may be iterated over again until the next load, which
        gathers the weights again on every rank.
        """
        ...

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """Two sums per weight, by Hugging Face name, over the weights in use; shards add up their sums.

        names: of these weights only, where it has them; None: of all.
        """
        ...

    def sleep(self) -> None:
        """Give device memory back; the weights are gone and must be loaded again."""
        ...

    def wake(self) -> None:
        """Map memory again; it cannot sample until ``load``. Does nothing if it is awake already."""
        ...


class RolloutEngine(Sampler, WeightTarget, Protocol):
    """A sampler that holds its own weights: it samples with those that were pushed to it."""
