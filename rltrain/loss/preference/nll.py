"""Supervised fine-tuning: the negative log-likelihood of given completions."""

from __future__ import annotations

from torch import Tensor

from rltrain.loss.preference.ratio import per_token
from rltrain.loss.preference.statistics import statistic
from rltrain.needs import LABELS, MEAN_LENGTH
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, LabelBatch, PolicySequences

__all__ = ["nll"]


@method("nll", arxiv="2203.02155", needs={MEAN_LENGTH}, traits={LABELS})
def nll(policy: PolicySequences, batch: LabelBatch) -> ExampleLoss:
    """The supervised stage of InstructGPT: the negative log-likelihood of every scored token,
    arXiv:2203.02155. Values (N,), nats.

    Formula: ``-ln pi(y|x) / L``, L the update's scored tokens per completion

    Its mean over the completions is the mean over all scored tokens of the update, so that every token counts
    the same, whatever micro-batch and rank it is in and however long its completion is.
    """
    length = statistic(batch, "mean_length", "nll").to(policy.logp.dtype)
    return ExampleLoss(-policy.logp / length, {"logp": _mean_log_prob(policy, batch)})


def _mean_log_prob(policy: PolicySequences, batch: LabelBatch) -> Tensor:
    """(N,) nats per token of each completion by itself, detached."""
    return per_token(policy.logp.detach(), batch.completion)
