"""Losses return numbers per token or per example; ``aggregate`` divides, ``objective`` puts a
recipe's loss together.
"""

from rltrain.registry import Registry

LOSS_TERMS = Registry(
    "loss term", modules=("rltrain.loss.terms.kl", "rltrain.loss.terms.entropy", "rltrain.loss.terms.distill")
)
AGGREGATES = Registry("aggregate", modules=("rltrain.loss.aggregate",))
