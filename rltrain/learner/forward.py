"""A causal language model as the learner calls it: a micro-batch in, per-token statistics out.

Everything happens inside ``forward`` of the module that accelerate prepares, and the output head runs inside
its own module's call, so that the hooks of DDP, FSDP2 and ZeRO-3, which gather weights and reduce gradients,
fire as for any other layer. Only the hidden states that predict a completion token reach the head. This file
does the one shift between tokens and logits there is: the hidden state at position t predicts token t + 1
(``MicroBatch.index`` names it).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rltrain.learner.alignment import alignment, is_alignment, last_mlp_inputs
from rltrain.learner.head import token_statistics
from rltrain.learner.packing import Layout, MicroBatch
from rltrain.model_limits import rotary_limit

__all__ = [
    "PolicyForward",
    "call_as_module",
    "cannot_pack",
    "resolve_layout",
    "scalar_head",
    "takes_positions",
]

# Kernels that know variable lengths. The others would spend S^2 on a mask of which little is used.
_VARIABLE_LENGTH_KERNELS = ("flash_attention_2", "flash_attention_3", "flex_attention")
# Architectures tested to keep packed sequences apart (tests/learner/test_forward.py). Not all do: OPT takes
# positions that restart and attends across them all the same.
PACKABLE_MODELS = (
    "cohere", "ernie4_5", "gemma", "gemma3_text", "glm4", "granite", "llama", "mistral",
    "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
_PACKABLE_LAYERS = {
    "full_attention",
    "sliding_attention",
}  # recurrent and chunked layers see the previous sequence

# Fewer tokens than this many logits make no chunk of their own: with a vocabulary of 100 the loop would cost
# more than the memory.
_MIN_CHUNK_LOGITS = 1 << 20
# Of what a head makes of a ramp: a factor nearer to 1 is none at all, and logits further off are no multiple
# of the ramp.
_NO_FACTOR, _PROPORTIONAL = 1e-5, 1e-4


class PolicyForward(nn.Module):
    """Wraps a transformers causal LM, bare or with peft adapters.

    Raises ValueError where its head cannot be reproduced exactly.
    """

    def __init__(self, model: nn.Module, *, fp32_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.fp32_head = fp32_head
        inner = causal_lm(model)
        _refuse_unknown_head(inner)
        self.hidden_scale, self.logit_scale = head_scales(inner)
        self.config = inner.config  # DeepSpeed and FSDP2 read both from the module they are given
        self._no_split_modules = inner._no_split_modules
        self._takes_positions = takes_positions(inner)
        self._unpackable = cannot_pack(inner)
        self.shares_prompts = takes_any_mask(
            inner
        )  # whether a line may hold a prompt and several completions
        self._rotary = rotary_limit(inner.config)

    @property
    def inner(self) -> PreTrainedModel:
        """The transformers model behind every wrapper."""
        return causal_lm(self.model)

    def tie_weights(self) -> None:
        """Make tied weights one tensor again: FSDP2 loads each shard of them by itself and then asks
        for this.
        """
        self.inner.tie_weights()

    def forward(
        self,
        micro: MicroBatch,
        *,
        temperature: float,
        wants: frozenset[str],
        chunk: int,
        given: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Each statistic of ``wants`` (``learner/head.py``) as (r, width) float32, 0 where a row has no
        token.

        given: (r,) numbers, one for each row, that statistics name as arguments. An alignment
        (``learner/alignment.py``) is one number for a row, at each of its tokens.
        """
        inner = causal_lm(self.model)
        aligned = {name for name in wants if is_alignment(name)}
        with last_mlp_inputs(inner) if aligned else contextlib.nullcontext([]) as seen:
            hidden = self._hidden_states(inner, micro)
        head = _head_of(inner)
        vocab = _features(head)[1]

        def statistics(hidden: Tensor) -> dict[str, Tensor]:
            return token_statistics(
                hidden * self.hidden_scale if self.hidden_scale != 1 else hidden,
                head.weight,
                micro.targets,
                temperature=temperature,
                wants=wants - aligned,
                chunk=max(chunk, _MIN_CHUNK_LOGITS // vocab),
                bias=head.bias,
                fp32_head=self.fp32_head,
                logit_scale=self.logit_scale,
                given={name: numbers.to(hidden.device)[micro.row] for name, numbers in (given or {}).items()},
            )

        values = call_as_module(head, statistics, hidden)
        values |= {name: alignment(name, seen[0], micro)[micro.row] for name in aligned}
        shape, at = (micro.rows.shape[0], micro.width), (micro.row, micro.column)
        return {name: value.new_zeros(shape).index_put(at, value) for name, value in values.items()}

    def _hidden_states(self, inner: PreTrainedModel, micro: MicroBatch) -> Tensor:
        """(n, H) the hidden state that predicts each completion token."""
        if micro.packed and self._unpackable is not None:
            raise ValueError(self._unpackable)
        if micro.attention_mask is not None and micro.attention_mask.dim() == 4 and not self.shares_prompts:
            raise ValueError(f"{type(inner).__name__} cannot share prompts; build its micro-batches without")
        if self._rotary is not None and (longest := int(micro.position_ids.max()) + 1) > self._rotary.tokens:
            raise ValueError(
                f"a row of {longest} tokens reached {type(inner).__name__}, which reads at most "
                f"{self._rotary.tokens} ({self._rotary.why})"
            )
        positions = {"position_ids": micro.position_ids} if self._takes_positions else {}
        # No cache, and no mask where rows have lines of their own: transformers then reads from restarting
        # positions where a packed sequence ends, and runs the plain causal kernel on right-padded rows, whose
        # padding comes after everything that is looked at.
        output = inner.base_model(
            input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False, **positions
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, micro.index)


def resolve_layout(layout: Literal["auto", "padded", "packed"], model: nn.Module) -> Layout:
    """``auto``: packed where the model's attention kernel knows variable lengths, else padded. Raises
    ValueError on a model that cannot be packed."""
    inner: Any = model if scalar_head(model) is not None else causal_lm(model)
    reason = cannot_pack(inner)
    if layout == "auto":
        return (
            "packed"
            if inner.config._attn_implementation in _VARIABLE_LENGTH_KERNELS and reason is None
            else "padded"
        )
    if layout == "packed" and reason is not None:
        raise ValueError(reason)
    return layout


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, or the model itself.

    Raises ValueError on anything but a decoder.
    """
    inner = (
        model.get_base_model()
        if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel)
        else model
    )
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} is not a transformers model; load it with AutoModelForCausalLM"
        )
    if inner.config.is_encoder_decoder or inner.get_output_embeddings() is None or inner.base_model is inner:
        raise ValueError(
            f"{type(inner).__name__} is not an output head over one decoder; load a causal language model"
        )
    prompt_learning = [
        name for name, config in getattr(model, "peft_config", {}).items() if config.is_prompt_learning
    ]
    if prompt_learning:
        raise ValueError(
            f"adapter {prompt_learning[0]!r} prepends virtual tokens, which move every position; use LoRA or "
            "full weights"
        )
    return inner


def scalar_head(model: nn.Module) -> nn.Linear | None:
    """The output of a model that transformers calls one for sequence classification; None for any other."""
    head = getattr(model, "score", None)
    return head if isinstance(model, PreTrainedModel) and isinstance(head, nn.Linear) else None


def takes_any_mask(model: PreTrainedModel) -> bool:
    """Whether every layer is full attention by PyTorch's kernel, with the mask and the positions it is given.

    The architectures are those tested to keep packed sequences apart by their positions.
    """
    config = model.config.get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    slides = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    kernel = model.config._attn_implementation
    return (
        full
        and not slides
        and kernel == "sdpa"
        and config.model_type in PACKABLE_MODELS
        and takes_positions(model)
    )


def head_scales(model: PreTrainedModel) -> tuple[float, float]:
    """(a, b) such that the model's logits are ``b head(a hidden)``. Raises ValueError where no such numbers
    exist.

    Found by running the model's own ``forward`` on a shell whose decoder and head are replaced by known
    tensors, so that it holds for architectures nobody listed (Granite and Cohere scale, Gemma 2 caps) and
    touches no weight. The known logits are large: a cap of 50 would be invisible on the logits of a fresh
    model.
    """
    head = _head_of(model)
    width, vocab = _features(head)
    ramp = (
        torch.linspace(-1.0, 1.0, 2 * width).view(1, 2, width),
        torch.linspace(-60.0, 60.0, 2 * vocab).view(1, 2, vocab),
    )
    decoder, known = _KnownDecoder(ramp[0], model.base_model), _KnownHead(ramp[1])
    shell = copy.copy(model)
    replaced = {id(model.base_model): decoder, id(model.get_output_embeddings()): known}
    shell._modules = {name: replaced.get(id(module), module) for name, module in model._modules.items()}
    with torch.no_grad():
        logits = shell(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
    before, after = _ratio(known.received, ramp[0]), _ratio(logits, ramp[1])
    if before is None or after is None or after <= 0:
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        raise ValueError(
            f"{type(model).__name__} does not give the output of its head as logits"
            + (f" (final_logit_softcapping is {cap})" if cap else "")
            + "; the learner only reproduces heads up to a constant factor: choose another model, or set the cap to null and retrain"
        )
    return before, after


def _ratio(found: Tensor | None, given: Tensor) -> float | None:
    """The number that ``found`` is ``given`` times, or None."""
    if found is None or found.shape != given.shape:
        return None
    found = found.double()
    factor = float((found * given).sum() / given.double().square().sum())
    factor = 1.0 if abs(factor - 1.0) < _NO_FACTOR else factor
    return (
        factor
        if torch.allclose(found, factor * given.double(), rtol=_PROPORTIONAL, atol=_PROPORTIONAL)
        else None
    )


class _KnownDecoder(nn.Module):
    """Answers every call with the same hidden states, its submodules' calls too; other attributes are
    the real decoder's.
    """

    def __init__(self, hidden: Tensor, real: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["real"] = real

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["real"], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *args: Any, **kwargs: Any) -> _KnownOutput:
        del args, kwargs
        return _KnownOutput(self.hidden)


class _KnownOutput:
    """A decoder's output of which only the hidden states are there: caches, router logits and the
    like read as None.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, at: int | slice) -> Any:
        return (self.last_hidden_state,)[at]

    def __getattr__(self, name: str) -> None:
        return None


class _KnownHead(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.received = logits, None
        self.weight = torch.empty(0)  # some models read its dtype or device

    def forward(self, hidden: Tensor) -> Tensor:
        self.received = hidden
        return self.logits


def _head_of(model: PreTrainedModel) -> nn.Linear:
    head: Any = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the head in full
        head = (
            head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
        )
    return head


def _features(head: nn.Linear) -> tuple[int, int]:
    """(hidden size, vocabulary), from the module: under ZeRO-3 the weight itself is empty outside its
    forward.
    """
    return head.in_features, head.out_features


def _refuse_unknown_head(model: PreTrainedModel) -> None:
    head = _head_of(model)
    if hasattr(head, "lora_A"):
        raise ValueError(
            "the output head carries a LoRA adapter, whose product the learner does not form; take lm_head "
            "out of target_modules"
        )
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"the output head is {type(head).__name__} of {head.weight.dtype}; a linear layer of floats was "
            "expected"
        )


def takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.base_model.forward).parameters


def cannot_pack(model: PreTrainedModel) -> str | None:
    """Why sequences packed in one row would see each other, or None."""
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS)
    kernel = model.config._attn_implementation
    if config.model_type not in PACKABLE_MODELS:
        reason = f"(model type {config.model_type!r}) is not among the architectures tested for it"
    elif odd:
        reason = f"has layers of type {', '.join(odd)}"
    elif kernel not in ("sdpa", "eager", *_VARIABLE_LENGTH_KERNELS):
        reason = f"uses the attention kernel {kernel!r}"
    else:
        return None
    return (
        f"{type(model).__name__} {reason}, so packed sequences might see each other; set learner.layout: "
        "padded"
    )


def call_as_module(module: nn.Module, function: Any, *inputs: Tensor) -> Any:
    """``function(*inputs)`` run as the forward of ``module``: with its hooks before and after."""
    kept = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(*inputs)
    finally:
        del module.forward
        if kept is not None:
            module.forward = kept
