"""One decoded token per row of a Llama-like model: what its own modules compute, from their own weights, in fewer calls.

A decode step of a small batch is bound by the number of calls, not by arithmetic. Models built otherwise are decoded by their own
forward; the engine's check at construction holds either against the plain one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rltrain.rollout.kv_cache import DecodeCache

__all__ = ["LLAMA_LIKE", "TokenDecoder", "place_together"]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # RMS norm, rotary attention, gated MLP with SiLU, a residual around each
_ALIGNED = 64  # entries: matrix kernels want weights to begin at round addresses


@dataclass(frozen=True)
class _Norm:
    weight: nn.Parameter
    eps: float

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(module.weight, module.variance_epsilon)

    def __call__(self, values: Tensor) -> Tensor:
        return F.rms_norm(values, (values.shape[-1],), self.weight, self.eps)


@dataclass(frozen=True)
class _Layer:
    """The modules of one decoder layer."""

    before_attention: _Norm
    projections: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]  # query, key, value, output
    head_norms: tuple[_Norm, _Norm] | None  # of queries and keys, where the model has them (Qwen3)
    scale: float
    before_mlp: _Norm
    mlp: tuple[nn.Linear, nn.Linear, nn.Linear]  # gate, up, down

    @classmethod
    def of(cls, module: Any) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        return cls(
            _Norm.of(module.input_layernorm),
            (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            (_Norm.of(attention.q_norm), _Norm.of(attention.k_norm)) if hasattr(attention, "q_norm") else None,
            attention.scaling,
            _Norm.of(module.post_attention_layernorm),
            (mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )


class TokenDecoder:
    """model: a transformers causal LM for which ``fits`` holds; its parameters may get other data at any time."""

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
        """(R, H) final hidden states of one token per row. tokens, positions (R,) int64; mask (R, 1, 1, columns) additive, or None."""
        hidden = self._embedding(tokens)
        cos, sin = self._rotary(hidden, positions[:, None])  # (R, 1, head size), the second half repeating the first
        half = self._head_size // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for index, layer in enumerate(self._layers):
            hidden = hidden + self._attended(index, layer, layer.before_attention(hidden), cos, sin, mask, cache)
            normed = layer.before_mlp(hidden)
            gate, up, down = layer.mlp
            opened, passed = _linears((gate, up), normed)
            hidden = hidden + _linear(down, F.silu(opened).mul_(passed))
        return self._norm(hidden)

    def _attended(
        self, index: int, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: DecodeCache
    ) -> Tensor:
        """(R, H) what attention adds; writes the token's keys and values. Query heads of one key-value head attend as its rows."""
        rows, size = hidden.shape[0], self._head_size
        query, key, value = (values.view(rows, -1, size) for values in _linears(layer.projections[:3], hidden))
        if layer.head_norms is not None:
            query, key = layer.head_norms[0](query), layer.head_norms[1](key)
        heads = torch.cat([query, key], dim=1)
        heads = torch.addcmul(heads * cos, heads.roll(size // 2, -1), sin)
        query, key = heads.split([query.shape[1], key.shape[1]], dim=1)
        keys, values = cache.update(key[:, :, None], value[:, :, None], index)
        folded = query.reshape(rows, keys.shape[1], -1, size)
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=layer.scale)
        return _linear(layer.projections[3], attended.reshape(rows, -1))


def _linear(module: nn.Linear, values: Tensor) -> Tensor:
    return F.linear(values, module.weight, module.bias)


def _linears(modules: Sequence[nn.Linear], values: Tensor) -> Sequence[Tensor]:
    """What each of ``modules`` makes of the same values; in one product where their weights stand one after the other in memory."""
    first = modules[0].weight
    end = first.data_ptr()
    for module in modules:
        if module.bias is not None or module.weight.data_ptr() != end or not _one_storage(module.weight, first):
            return [_linear(module, values) for module in modules]
        end += module.weight.nbytes
    sizes = [module.weight.shape[0] for module in modules]
    return F.linear(values, first.as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))).split(sizes, dim=-1)


def _one_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def place_together(parameters: Iterable[nn.Parameter], shapes: Iterable[Sequence[int]], *, keep: bool) -> None:
    """Give the parameters new memory of these shapes, one after the other in one buffer per dtype, so that neighbours can be
    multiplied with as one. keep: with what they hold."""
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
