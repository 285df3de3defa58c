"""How a causal language model makes logits of its last hidden states: the head, and constant factors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rltrain.errors import UserError

__all__ = ["head_scales", "head_size", "output_head"]

_NO_FACTOR = 1e-5  # a factor this near to 1 counts as 1
_PROPORTIONAL = 1e-4  # tolerance within which values count as a multiple of the known ones


def head_scales(model: PreTrainedModel) -> tuple[float, float]:
    """(a, b) such that the model's logits are ``b head(a hidden)``. Raises UserError where no such numbers
    exist.

    The model's own ``forward`` runs on a shell whose decoder and head return known tensors. This works
    without a list of architectures (Granite and Cohere scale, Gemma 2 caps) and touches no weight. The known
    logits are large, since a cap of 50 would not show on the logits of a fresh model.
    """
    head = output_head(model)
    width, vocab = head_size(head)
    known_hidden = torch.linspace(-1.0, 1.0, 2 * width).view(1, 2, width)
    known_logits = torch.linspace(-60.0, 60.0, 2 * vocab).view(1, 2, vocab)
    known_decoder = _KnownDecoder(known_hidden, model.base_model)
    known_head = _KnownHead(known_logits)

    shell = copy.copy(model)
    replaced = {id(model.base_model): known_decoder, id(model.get_output_embeddings()): known_head}
    shell._modules = {name: replaced.get(id(module), module) for name, module in model._modules.items()}
    with torch.no_grad():
        logits = shell(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits

    hidden_scale = _ratio(known_head.received, known_hidden)
    logit_scale = _ratio(logits, known_logits)
    if hidden_scale is None or logit_scale is None or logit_scale <= 0:
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        raise UserError(
            f"{type(model).__name__} does not give the output of its head as logits"
            + (f" (final_logit_softcapping is {cap})" if cap else "")
            + "; only heads up to a constant factor are reproduced: choose another model, or set the cap to "
            "null and retrain"
        )
    return hidden_scale, logit_scale


def _ratio(scaled: Tensor | None, original: Tensor) -> float | None:
    """The factor between ``original`` and ``scaled``; None where there is no such number."""
    if scaled is None or scaled.shape != original.shape:
        return None
    scaled = scaled.double()
    factor = float((scaled * original).sum() / original.double().square().sum())
    factor = 1.0 if abs(factor - 1.0) < _NO_FACTOR else factor
    expected = factor * original.double()
    is_proportional = torch.allclose(scaled, expected, rtol=_PROPORTIONAL, atol=_PROPORTIONAL)
    return factor if is_proportional else None


class _KnownDecoder(nn.Module):
    """Returns the same hidden states from every call, also of its submodules; other attributes are the real
    decoder's.
    """

    def __init__(self, hidden: Tensor, real: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["real"] = real

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.__dict__["real"], name)
        return self if isinstance(attribute, nn.Module) else attribute

    def forward(self, *args: Any, **kwargs: Any) -> _KnownOutput:
        del args, kwargs
        return _KnownOutput(self.hidden)


class _KnownOutput:
    """A decoder's output with hidden states only: caches, router logits and other attributes are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _KnownHead(nn.Module):
    """Returns the same logits from every call, and records the hidden states that it received."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.received = None
        self.weight = torch.empty(0)  # some models read its dtype or device

    def forward(self, hidden: Tensor) -> Tensor:
        self.received = hidden
        return self.logits


def output_head(model: PreTrainedModel) -> nn.Linear:
    head: Any = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the head in full
        if head.disable_adapters:
            return head.original_module
        return head.modules_to_save[head.active_adapters[0]]
    return head


def head_size(head: nn.Linear) -> tuple[int, int]:
    """(hidden size, vocabulary), from the module: under ZeRO-3 the weight is empty outside of a forward
    pass.
    """
    return head.in_features, head.out_features
