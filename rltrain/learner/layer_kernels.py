"""Other kernels for a decoder's layers: compiled by PyTorch, or Liger's RMSNorm, rotary embedding and SwiGLU.

Both fuse elementwise work, which eager layers spend a quarter of their time on; the formulas stay the same.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from rltrain.errors import UserError

__all__ = ["Kernels", "decoder_layers", "use_kernels"]

Kernels = Literal["eager", "compiled", "liger"]


def use_kernels(model: PreTrainedModel, kernels: Kernels) -> None:
    """Make the layers of ``model`` run by ``kernels``, in place, before a backend wraps it.

    Raises UserError where Liger is asked for and not installed, or does not know the architecture.
    """
    if kernels == "compiled":
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    elif kernels == "liger":
        _apply_liger(model)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks, in order."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _apply_liger(model: PreTrainedModel) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "learner.kernels is liger, but liger-kernel is not installed: pip install liger-kernel, or set "
            "it to compiled or eager"
        )
    from liger_kernel.transformers import monkey_patch  # type: ignore[import-not-found]

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"learner.kernels is liger, which has no kernels for {kind}: set it to compiled or eager"
        )
    # the output head is the learner's own (learner/head.py)
    options: dict[str, Any] = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    monkey_patch._apply_liger_kernel_to_instance(model=model, **options)
