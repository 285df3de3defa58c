"""What adapters promise. One contract suite each (``tests/contracts/``) runs against every implementation.

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
    MAPPED = "mapped"  # memory is there, contents are nobody's version
    LOADED = "loaded"  # holds the weights of `version`
    SERVING = "serving"  # has sampled with them


class WrongVersionError(RuntimeError):
    """An engine was asked to sample for a policy version whose weights it does not hold."""


class Sampler(Protocol):
    """Writes completions. Whole groups: ``rollout.groups.sample_groups``."""

    @property
    def name(self) -> str:
        """What messages call its engine: ``rollout.engine`` of the recipe."""
        ...

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """One answer per request, in any order; whoever cannot answer earlier yields all at the end.

        policy: the weights that must have sampled every token. Log-probs are of the distribution sampled from
        (temperature included, float32). Equal (weights, prompt id, sampling, sample index) give equal tokens
        on one machine, up to floating-point ties: whatever else is asked for, and however a group is cut into
        requests. Raises, at the call, WrongVersionError where ``policy`` is not held, and ValueError where a
        prompt plus ``max_tokens`` does not fit the model.
        """
        ...

    def close(self) -> None:
        """Release everything of its own; it is not used again. Closing twice does nothing."""
        ...


class WeightTarget(Protocol):
    """Takes the learner's weights and can prove that it multiplies with them, as ``sync/`` asks it to."""

    state: EngineState
    version: PolicyVersion | None  # of the weights it holds; None before the first load
    dtype: torch.dtype  # of the weights it holds; loading rounds to it
    fingerprint_rtol: (
        float  # relative rounding error of its fingerprints; 0 would be the same sums in the same order
    )

    @property
    def name(self) -> str:
        """What messages call its engine: ``rollout.engine`` of the recipe."""
        ...

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """Take the learner's weights as ``version``, and forget every cache of older ones.

        stream: Hugging Face names, full tensors.
        """
        ...

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """Two sums per weight, by Hugging Face name, over what it multiplies with; shards add theirs up.

        names: of these only, as far as it has them; None: of all.
        """
        ...

    def sleep(self) -> None:
        """Give device memory back; the weights are gone and must be loaded again."""
        ...

    def wake(self) -> None:
        """Map memory again; it samples for no version until ``load``. Nothing happens where it is awake."""
        ...


class RolloutEngine(Sampler, WeightTarget, Protocol):
    """A sampler whose weights are in its own hands: it samples from what was pushed to it."""
