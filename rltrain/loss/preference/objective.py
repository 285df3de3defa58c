"""A preference recipe's loss: a micro-batch's share of the update."""

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
    """Sum of values times weights over the micro-batch, divided by the update's number of examples."""

    loss: BoundMethod

    @property
    def needs(self) -> frozenset[str]:
        """Tensors that the batch must hold, with statistics replaced by the tensors that they need."""
        return tensors_of(self.loss)

    def __call__(
        self,
        policy: PolicyPairs | PolicySequences | RewardPairs | Tensor,
        batch: PairBatch | LabelBatch,
        totals: ExampleTotals,
    ) -> ObjectiveShare:
        """This micro-batch's share of the loss and of the metrics; the shares of all micro-batches and ranks
        add up.
        """
        result = self.loss(policy, batch)
        values = result.values if batch.weight is None else result.values * batch.weight
        count = max(totals.examples, 1)
        with torch.no_grad():
            reported = {"preference": values, **result.metrics}
            metrics = {f"loss/{name}": metric.sum() / count for name, metric in reported.items()}
        return ObjectiveShare(values.sum() / count, {name: value.detach() for name, value in metrics.items()})
