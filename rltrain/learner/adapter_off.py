"""The model that an adapter started from, as a frozen model without a second copy of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rltrain.learner.forward import PolicyForward
from rltrain.learner.packing import MicroBatch
from rltrain.learner.trained_model import TrainedModel

__all__ = ["AdapterOff", "FrozenModel"]


class AdapterOff:
    """Runs the trained model with its adapter switched off; called like a ``PolicyForward``.

    It runs what the backend wrapped, so that a call is a collective where weights are sharded.
    """

    def __init__(self, trained: TrainedModel) -> None:
        assert trained.adapter is not None
        self._trained = trained
        self._adapter = trained.adapter

    @torch.no_grad()
    def __call__(self, micro_batch: MicroBatch, **options: Any) -> Mapping[str, Tensor]:
        """``PolicyForward.forward``, without gradients."""
        with self._adapter.switched_off():
            return self._trained.wrapped_model(micro_batch, **options)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """``TrainedModel.base_model_weights``, a collective."""
        return self._trained.base_model_weights()

    @property
    def shares_prompts(self) -> str | None:
        return self._trained.unwrapped_model.shares_prompts

    @property
    def training(self) -> bool:
        return self._trained.wrapped_model.training

    def train(self, mode: bool = True) -> None:
        self._trained.wrapped_model.train(mode)


FrozenModel = PolicyForward | AdapterOff
