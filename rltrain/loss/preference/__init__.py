"""Preference losses: ``(policy, batch, *, hp) -> ExampleLoss``, one number per example, unreduced.

The inputs depend on the traits that a loss declares:

=====================  ================================  ============
traits                 policy (carries the gradient)     batch
=====================  ================================  ============
pairs                  PolicyPairs                       PairBatch
labels                 PolicySequences                   LabelBatch
pairs, scalar_head     RewardPairs                       PairBatch
labels, scalar_head    Tensor (N,), the head's reward    LabelBatch
=====================  ================================  ============

Further traits: "margins" (the data must have score differences or probabilities), "previous_policy" (a
frozen previous iterate in addition to the reference), "reference_free", "whole_groups" (all completions of a
prompt in one optimizer batch), "gamma_required".

``needs`` names tensors: fields of CompletionFacts that the learner computes (``ref_logp``, ``previous_logp``,
``logp_now``); fields of the batch (``margin``, ``p_chosen``, ``label``, and ``mismatched`` with its
``logp_now`` and ``ref_logp``); columns of the data (``column:pass_rate``); and statistics over the whole
optimizer batch, by their names in ``STATISTICS``. ``tensors_of`` replaces the statistics by the tensors that
they need.
"""

from rltrain.registry import BoundMethod, Registry

_PACKAGE = "rltrain.loss.preference"

PREFERENCE_LOSSES = Registry(
    "preference loss",
    modules=tuple(
        f"{_PACKAGE}.{name}"
        for name in (
            "dpo",
            "h_dpo",
            "f_dpo",
            "kto",
            "mmpo",
            "rpo",
            "napo",
            "inpo",
            "clo",
            "dco",
            "prm",
            "reference_free",
            "pairwise",
            "bco",
            "aot",
            "reward_model",
            "nll",
        )
    ),
)
STATISTICS = Registry("batch statistic", modules=(f"{_PACKAGE}.statistics",))


def statistics_of(loss: BoundMethod) -> tuple[str, ...]:
    """Names of the statistics over the optimizer batch that ``loss`` needs, in the registry's order."""
    return tuple(name for name in STATISTICS.names() if name in loss.needs)


def tensors_of(loss: BoundMethod) -> frozenset[str]:
    """Fields and columns (``column:<name>``) that ``loss`` and its statistics need in the batch."""
    names = statistics_of(loss)
    return (loss.needs - set(names)).union(*(STATISTICS.spec(name).needs for name in names))
