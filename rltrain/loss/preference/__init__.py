"""Preference losses: ``(policy, batch, *, hp) -> ExampleLoss``, one number per example, unreduced.

What arrives depends on the traits a loss declares:

=====================  ================================  ============
traits                 policy (carries the gradient)     batch
=====================  ================================  ============
pairs                  PolicyPairs                       PairBatch
labels                 PolicySequences                   LabelBatch
pairs, scalar_head     RewardPairs                       PairBatch
labels, scalar_head    Tensor (N,), the head's reward    LabelBatch
=====================  ================================  ============

Further traits: "margins" (the data must give score differences or probabilities), "previous_policy" (a frozen
previous iterate beside the reference), "reference_free", "whole_groups" (all completions of a prompt in one
optimizer batch), "gamma_required".

``needs`` names tensors: fields of CompletionFacts that the learner computes (``ref_logp``, ``previous_logp``,
``logp_now``); fields of the batch (``margin``, ``p_chosen``, ``label``, and ``mismatched`` with its
``logp_now`` and ``ref_logp``); columns of the data (``column:pass_rate``); and statistics over the whole
optimizer batch, which are the names of ``STATISTICS``. ``tensors_of`` resolves the statistics into what they
need in their turn.
"""

from rltrain.registry import BoundMethod, Registry

_HERE = "rltrain.loss.preference"

PREFERENCE_LOSSES = Registry(
    "preference loss",
    modules=tuple(
        f"{_HERE}.{name}"
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
            "reward_model",
        )
    ),
)
STATISTICS = Registry("batch statistic", modules=(f"{_HERE}.statistics",))


def statistics_of(loss: BoundMethod) -> tuple[str, ...]:
    """Names of the statistics over the optimizer batch that ``loss`` needs, in the registry's order."""
    return tuple(name for name in STATISTICS.names() if name in loss.needs)


def tensors_of(loss: BoundMethod) -> frozenset[str]:
    """Everything that must be in the batch before ``statistics.prepared``: fields, and columns as
    ``column:<name>``.
    """
    names = statistics_of(loss)
    return (loss.needs - set(names)).union(*(STATISTICS.spec(name).needs for name in names))
