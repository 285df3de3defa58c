"""Losses return values per token or per example; ``aggregate`` reduces them, ``objective`` composes them."""

from rltrain.registry import Registry

LOSS_TERMS = Registry(
    "loss term",
    modules=(
        "rltrain.loss.terms.kl",
        "rltrain.loss.terms.entropy",
        "rltrain.loss.terms.distill",
        "rltrain.loss.terms.imitation",
    ),
)
AGGREGATES = Registry("aggregate", modules=("rltrain.loss.aggregate",))
