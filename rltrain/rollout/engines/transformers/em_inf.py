"""EM-INF, arXiv:2505.15134: sharpens each step's logits at test time by minimising their entropy, without
changing a weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["minimise_entropy"]

# Adam's defaults, as released
_BETAS = (0.9, 0.999)
_EPS = 1e-8


def minimise_entropy(
    logits: Tensor,
    *,
    threshold: float = 0.3,
    lr: float = 0.1,
    max_steps: int = 15,
    kl_weight: float = 0.0,
    optimizer: Literal["adam", "sgd"] = "adam",
) -> Tensor:
    """(R, V) float32 logits after at most ``max_steps`` gradient steps on each row's entropy, which end once
    the entropy of the row is below ``threshold``.

    threshold: nats; the paper takes 0.1 to 0.5 and 5 to 15 steps. A row that is below it at the start stays
    unchanged. The gradients are in closed form: ``dH/dz = -p (ln p + H)``. With kl_weight (0.001 as released)
    the objective includes KL(p_start || p), whose gradient is p - p_start. optimizer "adam" is the released
    one; "sgd" is plain gradient descent. Raises ValueError on a bad argument.
    """
    if logits.dim() != 2 or not threshold > 0 or not lr > 0 or max_steps < 0 or kl_weight < 0:
        raise ValueError(
            f"logits {tuple(logits.shape)}, threshold {threshold}, lr {lr}, max_steps {max_steps}, kl_weight "
            f"{kl_weight}: expected (R, V), threshold and lr above 0, the others at least 0"
        )
    sharpened = logits.detach().float().clone()
    start = sharpened.softmax(-1)
    moment = torch.zeros_like(sharpened)
    square = torch.zeros_like(sharpened)
    for step in range(1, max_steps + 1):
        logp = sharpened.log_softmax(-1)
        p = logp.exp()
        entropy = -(p * logp).nan_to_num(nan=0.0).sum(-1, keepdim=True)
        is_above = entropy >= threshold
        if not bool(is_above.any()):
            break
        slope = -(p * (logp + entropy)).nan_to_num(nan=0.0) + kl_weight * (p - start)
        if optimizer == "adam":
            moment = _BETAS[0] * moment + (1 - _BETAS[0]) * slope
            square = _BETAS[1] * square + (1 - _BETAS[1]) * slope.square()
            slope = (moment / (1 - _BETAS[0] ** step)) / ((square / (1 - _BETAS[1] ** step)).sqrt() + _EPS)
        sharpened = torch.where(is_above, sharpened - lr * slope, sharpened)
    return sharpened
