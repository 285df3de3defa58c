"""What a model of a given transformers config can read: the longest row, and which tokens.

Two kinds of rotary embedding change their frequencies once the longest row of a batch passes a length:
LongRoPE switches from its short to its long factors (arXiv:2402.13753), dynamic NTK scaling stretches them.
Beyond that length a row's log-probs depend on the other rows of its batch, and those of a completion's first
tokens depend on its final length. Up to that length neither happens, so it counts as the end of the context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.errors import UserError

__all__ = [
    "Context",
    "context_of",
    "decoding_limit",
    "require_context",
    "require_room_for_tokens",
    "rotary_limit",
]

# Models that scale scores by another factor beyond the original context, whatever the type of their
# frequencies.
_OWN_ROTARY = ("phimoe",)


@dataclass(frozen=True)
class Context:
    """The most tokens a row may have."""

    tokens: int
    why: str  # which setting limits it, for errors


def context_of(config: Any) -> Context | None:
    """The context of a model by its transformers config; None where the config sets no limit."""
    rotary = rotary_limit(config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or (rotary is not None and rotary.tokens < positions):
        return rotary
    return Context(positions, "its max_position_embeddings")


def rotary_limit(config: Any) -> Context | None:
    """The length beyond which rotary frequencies depend on the longest row of a batch; None where they never
    do.
    """
    text = config.get_text_config()
    limits: list[Context] = []
    for parameters in _rotary_parameters(text):
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        if kind == "longrope" or (kind != "default" and text.model_type in _OWN_ROTARY):
            tokens = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
            why = f"its original context: rope_type {kind} rotates all rows of longer batches differently"
            limits.append(Context(tokens, why))
        elif "dynamic" in kind:
            reason = f"rope_type {kind} rotates all rows of longer batches differently"
            why = f"its max_position_embeddings: {reason}"
            limits.append(Context(text.max_position_embeddings, why))
    return min(limits, key=lambda context: context.tokens, default=None)


def decoding_limit(config: Any, name: str) -> Context:
    """The longest row that the transformers engine decodes: the context, or a sliding window within it.

    Raises UserError for layers without keys and values per token, which its cache cannot hold.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if unsupported := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{name} has {', '.join(sorted(unsupported))} layers, which the transformers engine cannot "
            "cache; use rollout.engine vllm"
        )
    context = context_of(config)
    if context is None:
        raise UserError(
            f"{name} has no max_position_embeddings, which bounds the transformers engine's cache; use "
            "rollout.engine vllm"
        )
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in kinds or (
        getattr(text, "layer_types", None) is None and getattr(text, "use_sliding_window", True)
    )
    if window is not None and slides and window < context.tokens:
        why = (
            "the sliding window, up to which the transformers engine decodes (rollout.engine vllm goes "
            "further)"
        )
        return Context(window, why)
    return Context(context.tokens, f"the model ({context.why})")


def _rotary_parameters(text: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of a text config: one mapping, or one for each type of layer."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]


def require_context(config: Any, name: str, sizes: Mapping[str, int]) -> None:
    """Raises UserError where the longest rows do not fit the model ``name``.

    sizes: the most tokens of each part of a row, by recipe key.
    """
    needed = sum(sizes.values())
    context = context_of(config)
    if context is not None and needed > context.tokens:
        parts = " + ".join(f"{key} {size}" for key, size in sizes.items())
        raise UserError(
            f"{parts} = {needed} tokens, but {name} reads at most {context.tokens} ({context.why}); lower "
            "one of them or choose a model with a longer context"
        )


def require_room_for_tokens(tokenizer: Any, vocabulary: int, path: str) -> None:
    """Raises UserError where ordinary text can contain a token that has no row in the embedding.

    tokenizer: of transformers. vocabulary: rows of the embedding. Published models may lack a row for a
    special token that they never read, as Gemma 3 1B does for images: that alone is no error, and
    ``Language.require_embedded`` checks the texts themselves.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    beyond = {
        id_: token for token, id_ in tokenizer.get_vocab().items() if id_ >= vocabulary and id_ not in special
    }
    if beyond:
        first = min(beyond)
        raise UserError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens and its embedding {vocabulary} rows, so "
            f"{len(beyond)} tokens have none, first {beyond[first]!r} ({first}): resize the embedding to the "
            "tokenizer, or take the tokenizer of the model"
        )
