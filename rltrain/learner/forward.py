"""A causal language model as the learner calls it: a micro-batch in, per-token statistics out.

All computation happens inside ``forward`` of the module that accelerate prepares, and the output head runs
inside its own module's call, so that the hooks of DDP, FSDP2 and ZeRO-3, which gather weights and reduce
gradients, run as for any other layer. Only the hidden states that predict a completion token reach the head.
Only this file shifts between tokens and logits: the hidden state at position t predicts token t + 1
(``MicroBatch.index`` is that position).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from rltrain.config.schema import Degree
from rltrain.errors import UserError
from rltrain.head_scales import head_scales, head_size, output_head
from rltrain.learner.alignment import alignment, is_alignment, last_mlp_inputs
from rltrain.learner.degree_head import (
    DEGREE_HEAD,
    degree_logits,
    is_degree_logit,
    last_positions,
    new_degree_head,
    place_at_last_tokens,
)
from rltrain.learner.head import token_statistics
from rltrain.learner.kept_tokens import LOG_KEPT_MASS
from rltrain.learner.packing import Layout, MicroBatch
from rltrain.model_limits import rotary_limit

__all__ = [
    "LAST_STATE",
    "PolicyForward",
    "call_as_module",
    "cannot_pack",
    "resolve_layout",
    "scalar_head",
    "takes_positions",
]

LAST_STATE = "last_state"
# Kernels that support variable lengths. The others would spend S^2 on a mask of which little is used.
_VARIABLE_LENGTH_KERNELS = ("flash_attention_2", "flash_attention_3", "flex_attention")
_SHARING_KERNELS: Mapping[str, Layout] = {"sdpa": "padded", "flex_attention": "packed"}
# Architectures tested to keep packed sequences apart (tests/learner/test_forward.py). Not all do: OPT takes
# restarting positions but still attends across them.
PACKABLE_MODELS = (
    "cohere", "ernie4_5", "gemma", "gemma3_text", "glm4", "granite", "llama", "mistral",
    "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
# Recurrent and chunked layers see the previous sequence.
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}

# A chunk has at least so many logits: with a vocabulary of 100, small chunks would cost more time than they
# save memory.
_MIN_CHUNK_LOGITS = 1 << 20


class PolicyForward(nn.Module):
    """Wraps a transformers causal LM, bare or with peft adapters, with a degree head beside it if the recipe
    has one.

    Raises ValueError where its head cannot be reproduced exactly.
    """

    def __init__(self, model: nn.Module, *, fp32_head: bool = False, degree: Degree | None = None) -> None:
        super().__init__()
        self.model = model
        self.fp32_head = fp32_head
        self.learning_rates: dict[str, float] = {}  # of parameters that have one of their own, by name
        inner = causal_lm(model)
        _refuse_unknown_head(inner)
        self.hidden_scale, self.logit_scale = head_scales(inner)
        self.config = inner.config  # DeepSpeed and FSDP2 read both from the module they are given
        self._no_split_modules = inner._no_split_modules
        self._takes_positions = takes_positions(inner)
        self._unpackable = cannot_pack(inner)
        # the layout in which a line may hold a prompt and several completions; None: in neither
        self.shares_prompts = sharing_layout(inner)
        self._rotary = rotary_limit(inner.config)
        if degree is not None:
            self.degree_head = new_degree_head(inner.config.get_text_config().hidden_size, degree.levels)
            self.learning_rates = {
                f"{DEGREE_HEAD}.{name}": degree.lr for name, _ in self.degree_head.named_parameters()
            }

    @property
    def inner(self) -> PreTrainedModel:
        """The transformers model behind every wrapper."""
        return causal_lm(self.model)

    base_model_prefix = "base_model"

    @property
    def base_model(self) -> nn.Module:
        """The decoder under the output head: accelerate looks for the last norm among its children."""
        return self.inner.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, of which accelerate makes a group of its own under FSDP2."""
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The output head, of which accelerate makes a group with the last norm under FSDP2."""
        return self.inner.get_output_embeddings()

    def tie_weights(self) -> None:
        """Make tied weights one tensor again; FSDP2 calls this after it has loaded each of them by itself."""
        self.inner.tie_weights()

    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        temperature: float,
        wants: frozenset[str],
        chunk: int,
        row_values: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Each statistic of ``wants`` (``learner/head.py``) as (r, width) float32, 0 where a row has no
        token.

        row_values: (r,) numbers, one for each row, that statistics name as arguments. Log-probs are over
        the tokens that truncated sampling kept, where it did. An alignment (``learner/alignment.py``) is
        one number for a row, repeated at each of its tokens. ``LAST_STATE`` is (r, H): the hidden state
        that predicts a row's last token.
        """
        inner = causal_lm(self.model)
        aligned = {name for name in wants if is_alignment(name)}
        degrees = {name for name in wants if is_degree_logit(name)}
        with last_mlp_inputs(inner) if aligned else contextlib.nullcontext([]) as mlp_inputs:
            hidden = self._hidden_states(inner, micro_batch)
        head = output_head(inner)
        vocab = head_size(head)[1]
        arguments: dict[str, Any] = {
            name: values.to(hidden.device)[micro_batch.row] for name, values in (row_values or {}).items()
        }

        renormalises = micro_batch.kept is not None and "logp" in wants
        if renormalises:
            arguments["kept"] = micro_batch.kept
        head_wants = (wants - aligned - degrees - {LAST_STATE}) | ({LOG_KEPT_MASS} if renormalises else set())

        def statistics(hidden: Tensor) -> dict[str, Tensor]:
            return token_statistics(
                hidden * self.hidden_scale if self.hidden_scale != 1 else hidden,
                head.weight,
                micro_batch.targets,
                temperature=temperature,
                wants=head_wants,
                chunk=max(chunk, _MIN_CHUNK_LOGITS // vocab),
                bias=head.bias,
                fp32_head=self.fp32_head,
                logit_scale=self.logit_scale,
                arguments=arguments,
            )

        values = call_as_module(head, statistics, hidden)
        if renormalises:
            values["logp"] = values["logp"] - values.pop(LOG_KEPT_MASS)
        values |= {name: alignment(name, mlp_inputs[0], micro_batch)[micro_batch.row] for name in aligned}
        values |= self._degrees(hidden, micro_batch) if degrees else {}
        shape = (micro_batch.rows.shape[0], micro_batch.width)
        indices = (micro_batch.row, micro_batch.column)
        result = {name: value.new_zeros(shape).index_put(indices, value) for name, value in values.items()}
        if LAST_STATE in wants:
            result[LAST_STATE] = hidden.index_select(0, last_positions(micro_batch))
        return result

    def _degrees(self, hidden: Tensor, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        last = last_positions(micro_batch)
        read = partial(degree_logits, head=self.degree_head)
        logits = call_as_module(self.degree_head, read, hidden.index_select(0, last))
        return place_at_last_tokens(logits, last, len(hidden))

    def _hidden_states(self, inner: PreTrainedModel, micro_batch: MicroBatch) -> Tensor:
        """(n, H) the hidden state that predicts each completion token."""
        if micro_batch.packed and self._unpackable is not None:
            raise ValueError(self._unpackable)
        mask = micro_batch.attention_mask
        shares = isinstance(mask, BlockMask) or (mask is not None and mask.dim() == 4)
        if shares and self.shares_prompts != ("packed" if micro_batch.packed else "padded"):
            raise ValueError(
                f"{type(inner).__name__} cannot share prompts; build its micro-batches without sharing"
            )
        if (
            self._rotary is not None
            and (longest := int(micro_batch.position_ids.max()) + 1) > self._rotary.tokens
        ):
            raise ValueError(
                f"a row of {longest} tokens reached {type(inner).__name__}, which reads at most "
                f"{self._rotary.tokens} ({self._rotary.why})"
            )
        positions = {"position_ids": micro_batch.position_ids} if self._takes_positions else {}
        # No cache, and no mask where each row has its own line: transformers then infers the ends of packed
        # sequences from restarting positions, and runs the plain causal kernel on right-padded rows, whose
        # padding comes after all tokens that count.
        output = inner.base_model(
            input_ids=micro_batch.input_ids,
            attention_mask=micro_batch.attention_mask,
            use_cache=False,
            **positions,
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, micro_batch.index)


def resolve_layout(layout: Literal["auto", "padded", "packed"], model: nn.Module) -> Layout:
    """``auto``: packed where the model's attention kernel supports variable lengths, otherwise padded.

    Raises UserError where ``packed`` is asked for and the model does not support it.
    """
    inner: Any = model if scalar_head(model) is not None else causal_lm(model)
    reason = cannot_pack(inner)
    if layout == "auto":
        kernel = inner.config._attn_implementation
        return "packed" if kernel in _VARIABLE_LENGTH_KERNELS and reason is None else "padded"
    if layout == "packed" and reason is not None:
        raise UserError(reason)
    return layout


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, or the model itself.

    Raises UserError on anything but a decoder.
    """
    inner = model
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        inner = model.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            f"{type(inner).__name__} is not a transformers model; load it with AutoModelForCausalLM"
        )
    if inner.config.is_encoder_decoder or inner.get_output_embeddings() is None or inner.base_model is inner:
        raise UserError(
            f"{type(inner).__name__} is not one decoder with an output head; load a causal language model"
        )
    prompt_learning = [
        name for name, config in getattr(model, "peft_config", {}).items() if config.is_prompt_learning
    ]
    if prompt_learning:
        raise UserError(
            f"adapter {prompt_learning[0]!r} prepends virtual tokens, which move every position; use LoRA or "
            "full weights"
        )
    return inner


def scalar_head(model: nn.Module) -> nn.Linear | None:
    """The output head of a transformers model for sequence classification; None for any other model."""
    head = getattr(model, "score", None)
    return head if isinstance(model, PreTrainedModel) and isinstance(head, nn.Linear) else None


def sharing_layout(model: PreTrainedModel) -> Layout | None:
    """The layout in which every layer is full attention by a kernel that uses the caller's mask and
    positions: padded for PyTorch's dense masks, packed for flex_attention's block-sparse ones.

    The architectures are those tested to keep packed sequences apart by their positions.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None
    slides = has_window and getattr(config, "use_sliding_window", True)
    is_full = layer_types == {"full_attention"} and not slides
    if not is_full or config.model_type not in PACKABLE_MODELS or not takes_positions(model):
        return None
    return _SHARING_KERNELS.get(str(model.config._attn_implementation))


def _refuse_unknown_head(model: PreTrainedModel) -> None:
    head = output_head(model)
    if hasattr(head, "lora_A"):
        raise UserError(
            "the output head has a LoRA adapter, whose product the learner does not compute; remove lm_head "
            "from target_modules"
        )
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise UserError(
            f"the output head is {type(head).__name__} of {head.weight.dtype}; a linear layer of floats was "
            "expected"
        )


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the decoder accepts ``position_ids``."""
    return "position_ids" in inspect.signature(model.base_model.forward).parameters


def cannot_pack(model: PreTrainedModel) -> str | None:
    """Why sequences packed in one row might see each other; None where they cannot."""
    config = model.config.get_text_config()
    unknown_layers = sorted(set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS)
    kernel = model.config._attn_implementation
    if config.model_type not in PACKABLE_MODELS:
        reason = f"(model type {config.model_type!r}) is not among the architectures tested for it"
    elif unknown_layers:
        reason = f"has layers of type {', '.join(unknown_layers)}"
    elif kernel not in ("sdpa", "eager", *_VARIABLE_LENGTH_KERNELS):
        reason = f"uses the attention kernel {kernel!r}"
    else:
        return None
    return (
        f"{type(model).__name__} {reason}, so packed sequences might see each other; set learner.layout: "
        "padded"
    )


def call_as_module(module: nn.Module, function: Any, *inputs: Tensor) -> Any:
    """Call ``function(*inputs)`` as the forward of ``module``, with the module's hooks before and after
    it.
    """
    original = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(*inputs)
    finally:
        del module.forward
        if original is not None:
            module.forward = original
