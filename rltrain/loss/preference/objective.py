"""A preference recipe's loss as a micro-batch's share of the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.loss.objective import ObjectiveShare
from rltrain.loss.preference import tensors_of
from rltrain.registry import BoundMethod
from rltrain.types.preference import (
    ExampleTotals,
    LabelBatch,
    PairBatch,
    PolicyPairs,
    PolicySequences,
    RewardPairs,
)

__all__ = ["PreferenceObjective"]


@dataclass(frozen=True)
class PreferenceObjective:
    """Values times the examples' weights, summed over the micro-batch and divided by the update's
    examples.
    """

    loss: BoundMethod

    @property
    def needs(self) -> frozenset[str]:
        """Tensors that must be in the batch; statistics are resolved into what they need."""
        return tensors_of(self.loss)

    def __call__(
        self,
        policy: PolicyPairs | PolicySequences | RewardPairs | Tensor,
        batch: PairBatch | LabelBatch,
        totals: ExampleTotals,
    ) -> ObjectiveShare:
        """This micro-batch's share of the loss and of the metrics; shares of all micro-batches and
        ranks add up.
        """
        result = self.loss(policy, batch)
        values = result.values if batch.weight is None else result.values * batch.weight
        count = max(totals.examples, 1)
        with torch.no_grad():
            metrics = {
                f"loss/{name}": shown.sum() / count
                for name, shown in {"preference": values, **result.metrics}.items()
            }
        return ObjectiveShare(values.sum() / count, {name: value.detach() for name, value in metrics.items()})
