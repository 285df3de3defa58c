"""What adapters promise. One contract suite per protocol (``tests/contracts/``) runs against every implementation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from rltrain.types import Prompt, RolloutGroup, Sampling


class EngineState(Enum):
    """ASLEEP -> MAPPED -> LOADED -> SERVING. Only an engine that has loaded version v generates for version v."""

    ASLEEP = "asleep"  # no weights on the device
    MAPPED = "mapped"  # memory is there, contents are nobody's version
    LOADED = "loaded"  # holds the weights of `version`
    SERVING = "serving"  # has generated with them


class WrongVersionError(RuntimeError):
    """An engine was asked to generate for a policy version whose weights it does not hold."""


class RolloutEngine(Protocol):
    """Samples completions from weights it can name the version of."""

    state: EngineState
    version: int | None  # of the weights it holds; None before the first load
    dtype: torch.dtype  # of the weights it holds; loading rounds to it
    fingerprint_rtol: float  # relative rounding error of its fingerprints; 0 would be the same sums in the same order

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[RolloutGroup]:
        """``sampling.n`` completions for each prompt, in order; group ids are positions in ``prompts``.

        Log-probs are of the distribution sampled from (temperature included, float32). Equal (weights, prompt id, sampling)
        give equal tokens on one machine, whatever else is in the batch up to floating-point ties. Raises WrongVersionError
        unless ``version`` is held, and ValueError when a prompt plus ``max_tokens`` does not fit the model.
        """
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the learner's weights (names of a checkpoint, full tensors) as ``version``; forget every cache of older ones."""
        ...

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, float]:
        """One number per weight, by checkpoint name, of what the engine multiplies with (``sync/fingerprint.py``).

        names: of these only, as far as the engine has them; None: of all.
        """
        ...

    def sleep(self) -> None:
        """Give device memory back; the weights are gone and must be loaded again."""
        ...

    def wake(self) -> None:
        """Map memory again. Still generates for no version until ``load``."""
        ...

    def close(self) -> None:
        """Release everything; the engine is not used again."""
        ...
