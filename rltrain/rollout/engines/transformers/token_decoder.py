"""The forward of a Llama-like model for prompts and decoded tokens: it computes what the model's own modules
compute, from their weights, in fewer calls.

The number of calls, not arithmetic, limits the decoding of a small batch. Other models are decoded by their
own forward; the engine compares either with the plain forward when it is constructed.
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

# RMS norm, rotary attention, gated MLP with SiLU, and a residual around attention and MLP
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_ALIGNED = 64  # entries: matrix kernels want weights to begin at round addresses

# (layer, its scale of scores, queries (N, heads, size), keys and values (N, key-value heads, size)) to
# (N, heads size)
Attend = Callable[[int, float, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Norm:
    """RMS norm, x w sqrt(H) / sqrt(|x|^2 + H eps), in fewer calls than PyTorch's own on CPUs."""

    weight: Tensor
    eps: float
    scaled: tuple[Tensor, Tensor] | None  # w sqrt(H), sqrt(H eps), where the short form is used

    @classmethod
    def from_module(cls, module: Any) -> _Norm:
        weight = module.weight.detach()
        eps = module.variance_epsilon
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return cls(weight, eps, None)
        size = weight.shape[0]
        return cls(weight, eps, (weight * math.sqrt(size), torch.tensor(math.sqrt(size * eps))))

    def __call__(self, values: Tensor) -> Tensor:
        if self.scaled is None:
            return F.rms_norm(values, values.shape[-1:], self.weight, self.eps)
        weight, min_norm = self.scaled
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True).hypot_(min_norm)
        return (values / norm).mul_(weight)


@dataclass(frozen=True)
class _Products:
    """Linear layers that read the same values, computed as a single product where their weights are
    contiguous in memory.
    """

    factors: Sequence[tuple[Tensor, Tensor | None]]  # (weight, bias)
    sizes: list[int] | None  # output size of each layer, where they are a single product

    @classmethod
    def from_modules(cls, *modules: nn.Linear) -> _Products:
        first = modules[0].weight
        sizes = [module.weight.shape[0] for module in modules]
        end = first.data_ptr()
        for module in modules:
            if (
                module.bias is not None
                or module.weight.data_ptr() != end
                or not _share_storage(module.weight, first)
            ):
                return cls([(module.weight, module.bias) for module in modules], None)
            end += module.weight.nbytes
        joined = first.detach().as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))
        return cls([(joined, None)], sizes)

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
    gate_up: _Products
    down: _Products

    @classmethod
    def from_module(cls, module: Any) -> _Layer:
        attention = module.self_attn
        mlp = module.mlp
        head_norms = None
        if hasattr(attention, "q_norm"):
            head_norms = _Norm.from_module(attention.q_norm), _Norm.from_module(attention.k_norm)
        return cls(
            _Norm.from_module(module.input_layernorm),
            _Products.from_modules(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms,
            attention.scaling,
            _Products.from_modules(attention.o_proj),
            _Norm.from_module(module.post_attention_layernorm),
            _Products.from_modules(mlp.gate_proj, mlp.up_proj),
            _Products.from_modules(mlp.down_proj),
        )


class TokenDecoder:
    """Computes hidden states with the weights of ``model``, a transformers causal LM for which ``fits``
    holds. It keeps the weights of the moment it was made: make a new decoder for every call that samples.
    """

    def __init__(self, model: Any) -> None:
        base = model.base_model
        self._embedding = base.embed_tokens
        self._rotary = base.rotary_emb
        self._norm = _Norm.from_module(base.norm)
        self._layers = [_Layer.from_module(layer) for layer in base.layers]
        self._head_size: int = base.layers[0].self_attn.head_dim

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this class computes what ``model`` computes."""
        config = model.config
        return config.model_type in LLAMA_LIKE and config.hidden_act == "silu"

    def __call__(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: DecodeCache) -> Tensor:
        """(R, H) final hidden states of a token per row, whose keys and values go into ``cache``. tokens,
        positions: (R,) int64; mask: (R, 1, 1, columns) additive, or None.
        """
        rows = tokens.shape[0]

        def attend(layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """Query heads of one key-value head attend as its rows."""
            keys, values = cache.update(key[:, :, None], value[:, :, None], layer)
            folded = query.reshape(rows, keys.shape[1], -1, self._head_size)
            return F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale).reshape(
                rows, -1
            )

        return self._forward(tokens, positions, attend)

    def read(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Final hidden states (U, T, H) of whole prompts, and each layer's keys and values (U, T, key-value
        heads, size).

        ids: (U, T), padded on the right, where causal attention never looks.
        """
        count, width = ids.shape
        layers: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            del layer
            # copies: views would keep the memory of the queries that were computed in the same product
            key = key.contiguous()
            value = value.contiguous()
            query, key, value = (
                heads.view(count, width, -1, self._head_size) for heads in (query.contiguous(), key, value)
            )
            layers.append((key, value))
            output = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=True,
                scale=scale,
                enable_gqa=True,
            )
            return output.transpose(1, 2).reshape(count * width, -1)

        positions = torch.arange(width, device=ids.device).repeat(count)
        return self._forward(ids.flatten(), positions, attend).view(count, width, -1), layers

    def _forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(N, H) final hidden states of ``tokens`` (N,)."""
        size = self._head_size
        hidden = self._embedding(tokens)
        # (N, 1, size) each; the second half repeats the first
        cos, sin = self._rotary(hidden, positions[:, None])
        sin = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], dim=-1)
        for index, layer in enumerate(self._layers):
            query, key, value = (
                heads.view(len(tokens), -1, size) for heads in layer.heads(layer.before_attention(hidden))
            )
            if layer.head_norms is not None:
                query = layer.head_norms[0](query)
                key = layer.head_norms[1](key)
            heads = torch.cat([query, key], dim=1)
            heads = torch.addcmul(heads * cos, heads.roll(size // 2, -1), sin)
            query, key = torch.split_with_sizes(heads, [query.shape[1], key.shape[1]], 1)
            hidden = layer.output(attend(index, layer.scale, query, key, value))[0].add_(hidden)
            gate, up = layer.gate_up(layer.before_mlp(hidden))
            hidden = layer.down(F.silu(gate).mul_(up))[0].add_(hidden)
        return self._norm(hidden)


def _share_storage(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def place_together(
    parameters: Iterable[nn.Parameter], shapes: Iterable[Sequence[int]], *, keep: bool
) -> None:
    """Gives the parameters new memory of these shapes, contiguous in a buffer per dtype, so that neighbours
    can be computed as a single product. keep: copies the parameters' values.
    """
    pairs = [(parameter, torch.Size(shape)) for parameter, shape in zip(parameters, shapes, strict=True)]
    for dtype in sorted({parameter.dtype for parameter, _ in pairs}, key=str):
        same_dtype = [(parameter, shape) for parameter, shape in pairs if parameter.dtype == dtype]
        sizes = [-(-shape.numel() // _ALIGNED) * _ALIGNED for _, shape in same_dtype]
        buffer = torch.empty(sum(sizes), dtype=dtype, device=same_dtype[0][0].device)
        for (parameter, shape), part in zip(same_dtype, buffer.split(sizes), strict=True):
            placed = part[: shape.numel()].view(shape)
            if keep:
                placed.copy_(parameter)
            parameter.data = placed
