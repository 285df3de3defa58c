"""SPO: beside any preference loss, the policy learns to tell how degraded an answer is, arXiv:2409.17791."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rltrain.loss.objective import ObjectiveShare
from rltrain.types.preference import ExampleTotals

__all__ = ["DegreeLoss", "spo_degree"]


def spo_degree(logits: Tensor, degree: Tensor) -> Tensor:
    """(D,) cross-entropy of "how degraded is this answer", to be added to any preference loss,
    arXiv:2409.17791.

    logits (D, K) come from a linear head on the last hidden state of D answers from which a share of the key
    phrases was deleted; degree (D,) int64 is 0 for the intact answer. The loss starts at ln K and so needs a
    small weight (0.1). Degraded answers never enter the preference loss. Confidence: low. Beyond the
    abstract's idea this is a reconstruction, and the classifier can infer the degree from the length.
    """
    return cross_entropy(logits, degree, reduction="none")


@dataclass(frozen=True)
class DegreeLoss:
    """``weight`` times the mean of ``spo_degree`` over the update's examples."""

    weight: float

    def __call__(
        self, share: ObjectiveShare, logits: Tensor, degree: Tensor, totals: ExampleTotals
    ) -> ObjectiveShare:
        """The preference loss's ``share`` of a micro-batch, with this loss of its degraded rows added."""
        count = max(totals.examples, 1)
        values = spo_degree(logits, degree)
        with torch.no_grad():
            right = (logits.argmax(1) == degree).to(values.dtype)
            metrics = {"loss/degree": values.sum() / count, "loss/degree_accuracy": right.sum() / count}
        return ObjectiveShare(share.loss + self.weight * values.sum() / count, {**share.metrics, **metrics})
