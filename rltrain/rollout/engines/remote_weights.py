"""What an engine knows of weights that other processes hold: which version was sent to them last."""

from __future__ import annotations

import torch

from rltrain.protocols import EngineState
from rltrain.types.samples import PolicyVersion

__all__ = ["RemoteWeights"]


class RemoteWeights:
    """The states of a ``WeightTarget`` on vLLM servers, whose memory is their own."""

    name = "vllm_server"
    fingerprint_rtol = 1e-12  # weights are compared as stored, except for the order of float64 sums

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.state = EngineState.MAPPED
        self.version: PolicyVersion | None = None

    def _forget_version(self) -> None:
        """Until the last weight is loaded, the weights belong to no version."""
        if self.state is EngineState.ASLEEP:
            raise RuntimeError("load() while asleep: call wake() first")
        self.version = None
        self.state = EngineState.MAPPED

    def _note_version(self, version: PolicyVersion) -> None:
        self.version = version
        self.state = EngineState.LOADED

    def sleep(self) -> None:
        """Only forgets the version."""
        self.version = None
        self.state = EngineState.ASLEEP

    def wake(self) -> None:
        if self.state is EngineState.ASLEEP:
            self.state = EngineState.MAPPED
