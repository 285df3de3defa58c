"""What a model of a given transformers config can read: how long a row, and which tokens.

Two kinds of rotary embedding change their frequencies once the longest row of a batch passes a length:
LongRoPE switches from its short to its long factors (arXiv:2402.13753), dynamic NTK scaling stretches them.
Beyond that length a row's log-probs depend on the rows beside it, and those of a completion's first tokens on
how long it becomes. Up to it they are those of any other model, so it counts as the end of the context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.errors import UserError

__all__ = ["Context", "context_of", "require_context", "require_room_for_tokens", "rotary_limit"]

_OWN_ROTARY = (
    "phimoe",
)  # scales scores by another factor beyond the original context, whatever the type of its frequencies


@dataclass(frozen=True)
class Context:
    """The most tokens a row may have."""

    tokens: int
    why: str  # what sets the bound, for errors


def context_of(config: Any) -> Context | None:
    """Of a transformers config; None where it sets no bound."""
    rotary, positions = (
        rotary_limit(config),
        getattr(config.get_text_config(), "max_position_embeddings", None),
    )
    if positions is None or (rotary is not None and rotary.tokens < positions):
        return rotary
    return Context(positions, "its max_position_embeddings")


def rotary_limit(config: Any) -> Context | None:
    """The length beyond which rotary frequencies depend on the longest row of a batch; None where
    they never do.
    """
    text = config.get_text_config()
    found: list[Context] = []
    for parameters in _rotary_parameters(text):
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        if kind == "longrope" or (kind != "default" and text.model_type in _OWN_ROTARY):
            tokens = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
            found.append(
                Context(
                    tokens,
                    f"its original context: rope_type {kind} turns every row of a longer batch otherwise",
                )
            )
        elif "dynamic" in kind:
            why = f"its max_position_embeddings: rope_type {kind} turns every row of a longer batch otherwise"
            found.append(Context(text.max_position_embeddings, why))
    return min(found, key=lambda context: context.tokens, default=None)


def _rotary_parameters(text: Any) -> Iterator[Mapping[str, Any]]:
    """One mapping, or one for each type of layer."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]


def require_context(config: Any, name: str, sizes: Mapping[str, int]) -> None:
    """Raises UserError where rows whose parts have at most these sizes, by recipe key, do not fit the
    model ``name``.
    """
    needed, context = sum(sizes.values()), context_of(config)
    if context is not None and needed > context.tokens:
        parts = " + ".join(f"{key} {size}" for key, size in sizes.items())
        raise UserError(
            f"{parts} = {needed} tokens, but {name} reads at most {context.tokens} ({context.why}); lower "
            "one of them or choose a "
            "model with a longer context"
        )


def require_room_for_tokens(tokenizer: Any, vocabulary: int, path: str) -> None:
    """Raises UserError where ordinary text can give a token that has no row among the ``vocabulary`` of the
    embedding.

    tokenizer: of transformers. Published models may lack a row for a special token that they never read, as
    Gemma 3 1B does for images: that alone is no error, and ``Language.require_embedded`` looks at the texts.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    beyond = {
        id_: token for token, id_ in tokenizer.get_vocab().items() if id_ >= vocabulary and id_ not in special
    }
    if beyond:
        first = min(beyond)
        raise UserError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens and its embedding {vocabulary} rows, so "
            f"{len(beyond)} tokens have none, "
            f"first {beyond[first]!r} ({first}): resize the embedding to the tokenizer, or take the "
            "tokenizer of the model"
        )
