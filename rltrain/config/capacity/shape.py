"""A model's sizes, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.json_text import parse_json

_INTEGERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # three matrices in the MLP, norms without bias
_OPTIONAL_INTEGERS = ("head_dim", "num_key_value_heads")
KINDS = (*_GATED, "gpt_neox")


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. Counts are of parameters or numbers, not bytes."""

    kind: str  # transformers' model_type
    hidden: int
    layers: int
    heads: int
    head_width: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool  # the output head is the embedding
    layer: int  # parameters of a layer

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output head."""
        return self.vocabulary * self.hidden

    @property
    def last_norm(self) -> int:
        return self.hidden * (2 if self.kind == "gpt_neox" else 1)

    @property
    def norms(self) -> int:
        """Parameters of all norms."""
        in_layer = {"gpt_neox": 4 * self.hidden, "qwen3": 2 * self.hidden + 2 * self.head_width}
        return self.layers * in_layer.get(self.kind, 2 * self.hidden) + self.last_norm

    @property
    def root(self) -> int:
        """Parameters outside the layers."""
        return self.embedding * (1 if self.tied else 2) + self.last_norm

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root

    @property
    def largest_tensor(self) -> int:
        return max(self.embedding, self.inner * self.hidden)

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers in the keys and values of all layers."""
        return 2 * self.layers * self.kv_width


def shape_of(facts: Mapping[str, Any]) -> ModelShape | None:
    """The shape in a config.json; None for a kind that is not in ``KINDS``, or sizes that are none."""
    kind = facts.get("model_type")
    optional = {key: facts[key] for key in _OPTIONAL_INTEGERS if facts.get(key) is not None}
    sizes = [*(facts.get(key) for key in _INTEGERS), *optional.values()]
    if kind not in KINDS or not all(map(_is_size, sizes)):
        return None
    hidden, layers, heads, inner, vocabulary = (facts[key] for key in _INTEGERS)
    head_width = optional.get("head_dim", hidden // heads)
    kv_heads = optional.get("num_key_value_heads", heads)
    query = heads * head_width
    kv = kv_heads * head_width
    if kind == "gpt_neox":
        layer = 4 * hidden * hidden + 4 * hidden + 2 * hidden * inner + inner + hidden + 4 * hidden
    else:
        attention = 2 * hidden * query + 2 * hidden * kv
        if kind == "qwen2":
            attention += query + 2 * kv
        elif facts.get("attention_bias"):
            attention += query + 2 * kv + hidden
        if kind == "qwen3":
            attention += 2 * head_width
        mlp = 3 * hidden * inner + (2 * inner + hidden if facts.get("mlp_bias") else 0)
        layer = attention + mlp + 2 * hidden
    tied = bool(facts.get("tie_word_embeddings", kind == "gemma"))
    return ModelShape(kind, hidden, layers, heads, head_width, kv_heads, inner, vocabulary, tied, layer)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_shape(config: Path) -> ModelShape | None:
    """``shape_of`` a file; None where it is missing or no JSON."""
    try:
        facts = parse_json(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return shape_of(facts) if isinstance(facts, dict) else None
