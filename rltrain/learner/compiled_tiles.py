"""The two functions of a tile of logits as compiled kernels: one pass over the logits for the statistics, one
for the gradient, where PyTorch's own kernels make eleven.

The formulas are those of ``head.py``, which stays the reference and what runs wherever nothing compiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["logits_gradient", "serve", "softmax_numbers"]

_LOG = logging.getLogger(__name__)
_DEVICES = {"cuda"}  # device types where compiled kernels are the default
_TRIAL = (8, 4096)  # tokens and vocabulary of the first compilation


def serve(device: torch.device) -> bool:
    """Whether tiles on ``device`` run as compiled kernels: on a GPU with a compiler that works."""
    return device.type in _DEVICES and not _is_switched_off() and compiles_on(str(device))


def _is_switched_off() -> bool:
    """Whether TORCH_COMPILE_DISABLE is set."""
    from torch._dynamo import config

    return bool(config.disable)


@cache
def compiles_on(device: str) -> bool:
    """Whether both functions compile and give the reference's numbers on ``device``; warns where not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_TRIAL, generator=generator).bfloat16().to(device)
    targets = torch.arange(_TRIAL[0], device=device)
    grad = torch.ones(_TRIAL[0], device=device)
    try:
        log_z, logp, entropy = softmax_numbers(logits, targets, 1.0, torch.float32, entropy=True)
        gradient = logits.clone()
        logits_gradient(gradient, targets, log_z, entropy, grad, grad, 1.0)
    except (RuntimeError, ImportError, OSError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _LOG.warning("the output head runs uncompiled, since torch.compile fails here: %.200s", reason)
        return False
    expected = logits.float().log_softmax(-1)
    slope = expected.exp() * (-1 - expected - entropy[:, None])
    slope.scatter_add_(1, targets[:, None], grad[:, None])
    agrees = (
        torch.allclose(logp, expected.gather(1, targets[:, None]).squeeze(1), rtol=1e-4, atol=1e-4)
        and torch.allclose(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-4)
        and torch.allclose(gradient.float(), slope, rtol=2e-2, atol=1e-4)
    )
    if not agrees:
        _LOG.warning("the output head runs uncompiled: compiled kernels give other numbers on %s", device)
    return agrees


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for any number of rows."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def softmax_numbers(
    z: Tensor, targets: Tensor, inverse_temperature: float, math: torch.dtype, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log Z, log-prob of the target, entropy), each (r,), of logits (r, V), as the head defines them."""
    return _compile(_softmax_numbers)(z, targets, inverse_temperature, math, entropy)


def _softmax_numbers(
    z: Tensor, targets: Tensor, inverse_temperature: float, math: torch.dtype, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = z.to(math) * inverse_temperature
    top = scaled.amax(-1, keepdim=True)
    shifted = scaled - top
    weights = shifted.exp()
    total = weights.sum(-1)
    log_total = total.log()
    logp = z.gather(1, targets[:, None]).squeeze(1).to(math) * inverse_temperature - top.squeeze(1)
    logp = logp - log_total
    spread = log_total - (weights * shifted).sum(-1) / total if entropy else torch.zeros_like(logp)
    return top.squeeze(1) + log_total, logp, spread


def logits_gradient(
    z: Tensor,
    targets: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    inverse_temperature: float,
) -> None:
    """Overwrite the logits ``z (r, V)`` by their gradient."""
    _compile(_logits_gradient)(z, targets, log_z, entropy, grad_logp, grad_entropy, inverse_temperature)


def _logits_gradient(
    z: Tensor,
    targets: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    inverse_temperature: float,
) -> None:
    logp = z.to(log_z.dtype) * inverse_temperature - log_z[:, None]
    factor = torch.zeros_like(log_z) if grad_logp is None else -grad_logp
    factor = factor[:, None]
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (entropy[:, None] + logp)
    gradient = logp.exp() * factor
    if grad_logp is not None:
        # a comparison in the same pass, where scatter_add would make another
        is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
        gradient = gradient + torch.where(is_target, grad_logp[:, None], 0.0)
    z.copy_(gradient * inverse_temperature)
