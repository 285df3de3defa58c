"""AdamW and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR

from rltrain.config.schema import Optimizer


def build_optimizer(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; weight decay only on matrices, not on norms and biases."""
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps)


def build_schedule(optimizer: torch.optim.Optimizer, settings: Optimizer, total_updates: int) -> LambdaLR:
    """Linear warm-up over ``warmup_steps`` updates, then constant, linear to 0 or cosine to 0 at ``total_updates``."""

    def factor(update: int) -> float:
        if update < settings.warmup_steps:
            return (update + 1) / settings.warmup_steps
        progress = (update - settings.warmup_steps) / max(total_updates - settings.warmup_steps, 1)
        match settings.schedule:
            case "constant":
                return 1.0
            case "linear":
                return max(1.0 - progress, 0.0)
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)
