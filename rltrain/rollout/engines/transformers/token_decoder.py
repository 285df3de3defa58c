"""Prompts and decoded tokens of a Llama-like model: what its own modules compute, from their own weights, in
fewer calls.

Decoding a small batch is bound by the number of calls, not by arithmetic. Models built otherwise are decoded
by their own forward; the engine's check at construction holds either against the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rltrain.rollout.engines.transformers.kv_cache import DecodeCache

__all__ = ["LLAMA_LIKE", "TokenDecoder", "place_together"]

LLAMA_LIKE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # RMS norm, rotary attention, gated MLP with SiLU, a residual around each
_ALIGNED = 64  # entries: matrix kernels want weights to begin at round addresses

# (layer, its scale of scores, queries (N, heads, size), keys and values (N, key-value heads, size)) to (N,
# heads size)
Attend = Callable[[int, float, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Norm:
    """x w sqrt(H) / sqrt(|x|^2 + H eps), in fewer calls than PyTorch's own on CPUs."""

    weight: Tensor
    eps: float
    scaled: tuple[Tensor, Tensor] | None  # w sqrt(H), sqrt(H eps), where the short form is used

    @classmethod
    def of(cls, module: Any) -> _Norm:
        weight, eps = module.weight.detach(), module.variance_epsilon
        short = weight.device.type == "cpu" and weight.dtype == torch.float32
        size = weight.shape[0]
        return cls(
            weight, eps, (weight * math.sqrt(size), torch.tensor(math.sqrt(size * eps))) if short else None
        )

    def __call__(self, values: Tensor) -> Tensor:
        if self.scaled is None:
            return F.rms_norm(values, values.shape[-1:], self.weight, self.eps)
        weight, least = self.scaled
        return (values / torch.linalg.vector_norm(values, dim=-1, keepdim=True).hypot_(least)).mul_(weight)


@dataclass(frozen=True)
class _Products:
    """Linear layers that read the same values, as one product where their weights stand one after the
    other in memory.
    """

    factors: Sequence[tuple[Tensor, Tensor | None]]
    sizes: list[int] | None  # of what each layer makes, where they are one product

    @classmethod
    def of(cls, *modules: nn.Linear) -> _Products:
        first = modules[0].weight
        sizes, end = [module.weight.shape[0] for module in modules], first.data_ptr()
        for module in modules:
            if (
                module.bias is not None
                or module.weight.data_ptr() != end
                or not _one_storage(module.weight, first)
            ):
                return cls([(module.weight, module.bias) for module in modules], None)
            end += module.weight.nbytes
        return cls(
            [(first.detach().as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1)), None)], sizes
        )

    def __call__(self, values: Tensor) -> Sequence[Tensor]:
        if self.sizes is None:
            return [F.linear(values, weight, bias) for weight, bias in self.factors]
        return torch.split_with_sizes(F.linear(values, self.factors[0][0]), self.sizes, -1)


@dataclass(frozen=True)
class _Layer:
    """The weights of one decoder layer."""

    before_attention: _Norm
    heads: _Products  # query, key, value
    head_norms: tuple[_Norm, _Norm] | None  # of queries and keys, where the model has them (Qwen3)
    scale: float
    output: _Products
    before_mlp: _Norm
    opening: _Products  # gate, up
    down: _Products

    @classmethod
    def of(cls, module: Any) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        return cls(
            _Norm.of(module.input_layernorm),
            _Products.of(attention.q_proj, attention.k_proj, attention.v_proj),
            (_Norm.of(attention.q_norm), _Norm.of(attention.k_norm))
            if hasattr(attention, "q_norm")
            else None,
            attention.scaling,
            _Products.of(attention.o_proj),
            _Norm.of(module.post_attention_layernorm),
            _Products.of(mlp.gate_proj, mlp.up_proj),
            _Products.of(mlp.down_proj),
        )


class TokenDecoder:
    """model: a transformers causal LM for which ``fits`` holds. Holds its weights as they are now: make a new
    one for every ``generate`` call."""

    def __init__(self, model: Any) -> None:
        base = model.base_model
        self._embedding, self._rotary, self._norm = base.embed_tokens, base.rotary_emb, _Norm.of(base.norm)
        self._layers = [_Layer.of(layer) for layer in base.layers]
        self._head_size: int = base.layers[0].self_attn.head_dim

    @staticmethod
    def fits(model: Any) -> bool:
        config = model.config
        return config.model_type in LLAMA_LIKE and config.hidden_act == "silu"

    def __call__(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: DecodeCache) -> Tensor:
        """(R, H) final hidden states of one token per row, whose keys and values are written. tokens,
        positions (R,) int64; mask (R, 1, 1, columns) additive, or None."""
        rows = tokens.shape[0]

        def attend(layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """Query heads of one key-value head attend as its rows."""
            keys, values = cache.update(key[:, :, None], value[:, :, None], layer)
            folded = query.reshape(rows, keys.shape[1], -1, self._head_size)
            return F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale).reshape(
                rows, -1
            )

        return self._through(tokens, positions, attend)

    def read(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Final hidden states (U, T, H) of whole prompts, and each layer's keys and values (U, T, key-value
        heads, size).

        ids (U, T), padded on the right: causal attention never looks there.
        """
        count, width = ids.shape
        kept: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            del layer
            key, value = (
                key.contiguous(),
                value.contiguous(),
            )  # else they would keep the queries they were computed with
            query, key, value = (
                heads.view(count, width, -1, self._head_size) for heads in (query.contiguous(), key, value)
            )
            kept.append((key, value))
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            return attended.transpose(1, 2).reshape(count * width, -1)

        positions = torch.arange(width, device=ids.device).repeat(count)
        return self._through(ids.flatten(), positions, attend).view(count, width, -1), kept

    def _through(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(N, H) final hidden states of ``tokens`` (N,)."""
        size = self._head_size
        hidden = self._embedding(tokens)
        cos, sin = self._rotary(
            hidden, positions[:, None]
        )  # (N, 1, size), the second half repeating the first
        sin = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], dim=-1)
        for index, layer in enumerate(self._layers):
            query, key, value = (
                heads.view(len(tokens), -1, size) for heads in layer.heads(layer.before_attention(hidden))
            )
            if layer.head_norms is not None:
                query, key = layer.head_norms[0](query), layer.head_norms[1](key)
            heads = torch.cat([query, key], dim=1)
            heads = torch.addcmul(heads * cos, heads.roll(size // 2, -1), sin)
            query, key = torch.split_with_sizes(heads, [query.shape[1], key.shape[1]], 1)
            hidden = layer.output(attend(index, layer.scale, query, key, value))[0].add_(hidden)
            opened, passed = layer.opening(layer.before_mlp(hidden))
            hidden = layer.down(F.silu(opened).mul_(passed))[0].add_(hidden)
        return self._norm(hidden)


def _one_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def place_together(
    parameters: Iterable[nn.Parameter], shapes: Iterable[Sequence[int]], *, keep: bool
) -> None:
    """Give the parameters new memory of these shapes, one after the other in one buffer per dtype, so that
    neighbours can be multiplied with as one. keep: with what they hold."""
    pairs = [(parameter, torch.Size(shape)) for parameter, shape in zip(parameters, shapes, strict=True)]
    for dtype in sorted({parameter.dtype for parameter, _ in pairs}, key=str):
        mine = [(parameter, shape) for parameter, shape in pairs if parameter.dtype == dtype]
        rooms = [-(-shape.numel() // _ALIGNED) * _ALIGNED for _, shape in mine]
        buffer = torch.empty(sum(rooms), dtype=dtype, device=mine[0][0].device)
        for (parameter, shape), part in zip(mine, buffer.split(rooms), strict=True):
            placed = part[: shape.numel()].view(shape)
            if keep:
                placed.copy_(parameter)
            parameter.data = placed
