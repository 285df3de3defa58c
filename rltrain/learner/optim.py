"""Optimizers and their schedule."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from rltrain.config.schema import Optimizer
from rltrain.learner.shards import MASTER, gather_rows, local_part, local_rows
from rltrain.types.tensor_parts import TensorPart, read_part, shape_in


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    settings: Optimizer,
    rates: Mapping[str, float] | None = None,
    matrices: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters that require a gradient; weight decay only on matrices, not
    on norms and biases.

    rates: learning rates of their own, by parameter name. matrices: names of those that Muon updates.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
    rates = {} if rates is None else rates
    members: dict[tuple[bool, bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trained:
        is_vector = len(full_shape(parameter)) < 2
        by_muon = settings.name == "muon" and name in matrices
        members.setdefault((not by_muon, is_vector, rates.get(name, settings.lr)), []).append(parameter)
    order = sorted(members, key=lambda key: (*key[:2], key[2] != settings.lr))
    groups = [
        {"params": members[key], "weight_decay": 0.0 if key[1] else settings.weight_decay, "lr": key[2]}
        for key in order
    ]
    return _optimizer_over(groups, sum(not key[0] for key in order), settings)


def _optimizer_over(
    groups: list[dict[str, Any]], muon_groups: int, settings: Optimizer
) -> torch.optim.Optimizer:
    """muon_groups: the first ones are Muon's."""
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    match settings.name:
        case "adamw_8bit":
            from bitsandbytes.optim.adamw import AdamW8bit

            return AdamW8bit(groups, **options)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=settings.lr, alpha=settings.alpha, eps=settings.eps)
        case "muon":
            return MuonWithAdamW(groups, muon_groups, options)
        case "adamw":
            return torch.optim.AdamW(groups, **options, fused=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for all other parameters, as one optimizer with one state.

    Muon's updates are scaled to the size of AdamW's (arXiv:2502.16982), so that both take the same learning
    rate. groups: Muon's ``muon_groups`` first. options: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], muon_groups: int, options: Mapping[str, Any]) -> None:
        self._muon_groups = muon_groups
        self._parts: list[torch.optim.Optimizer] = []
        if muon_groups:
            muon = torch.optim.Muon(groups[:muon_groups], lr=options["lr"], adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if groups[muon_groups:]:
            self._parts.append(torch.optim.AdamW(groups[muon_groups:], **options, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Both optimizers' steps; ``closure`` is not called."""
        del closure
        starts = [0, self._muon_groups] if len(self._parts) == 2 else [0]
        for part, start in zip(self._parts, starts, strict=True):
            # a loaded state has groups and slots of its own
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            part.state = self.state
            part.step()


def hidden_matrices(module: torch.nn.Module) -> set[str]:
    """The names of the weights that Muon updates: matrices, without those that embed or predict tokens."""
    model: Any = module
    ends = [layer for layer in model.modules() if isinstance(layer, torch.nn.Embedding)]
    ends += [layer for layer in (model.get_output_embeddings(), getattr(model, "score", None)) if layer]
    outside = {id(layer.weight) for layer in ends}
    return {
        name
        for name, weight in model.named_parameters()
        if len(full_shape(weight)) == 2 and id(weight) not in outside
    }


def build_schedule(optimizer: torch.optim.Optimizer, settings: Optimizer, total_updates: int) -> LambdaLR:
    """Linear warm-up over ``warmup_steps`` updates, then constant, or down linearly or along a cosine to
    ``min_lr_ratio`` times the rate, reached at ``total_updates``.
    """
    floor = settings.min_lr_ratio

    def factor(update: int) -> float:
        if update < settings.warmup_steps:
            return (update + 1) / settings.warmup_steps
        progress = (update - settings.warmup_steps) / max(total_updates - settings.warmup_steps, 1)
        match settings.schedule:
            case "constant":
                return 1.0
            case "linear":
                return floor + (1.0 - floor) * max(1.0 - progress, 0.0)
            case "cosine":
                cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
                return floor + (1.0 - floor) * cosine

    return LambdaLR(optimizer, factor)


# Sets of slots that a parameter may have: AdamW's; those of AdamW in 8 bits, for large and small tensors;
# RMSprop's; Muon's. The absmax are the scales of blocks of moments, the qmap what each of the 256 numbers of
# 8 bits stands for.
_SMALL_8BIT = frozenset({"state1", "state2", "step"})
_SLOTS = (
    frozenset({"exp_avg", "exp_avg_sq", "step"}),
    _SMALL_8BIT | {"absmax1", "absmax2", "qmap1", "qmap2"},
    _SMALL_8BIT,
    frozenset({"square_avg", "step"}),
    frozenset({"momentum_buffer"}),
)
_UNLIKE_PARAMETER = ("step", "absmax1", "absmax2", "qmap1", "qmap2")  # of shapes of their own

# state ------------------------------------------------------------------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]]
) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state by parameter name and slot (``lm_head.weight/exp_avg``), one tensor at a time.

    Sharded state is gathered: a collective, in which every rank must iterate over all tensors.
    """
    for name, parameter in named:
        for slot, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{slot}", gather_rows(_as_tensor(value)).detach()


def _as_tensor(value: Any) -> Tensor:
    """A slot's value; bitsandbytes counts updates with an integer."""
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, torch.nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Restore a result of ``optimizer_tensors``.

    Raises ValueError when it has other parameters or shapes.
    """
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    check_state(trained, tensors)
    optimizer.state.clear()
    for key in tensors:
        name, _, slot = key.rpartition("/")
        parameter = trained[name]
        if isinstance(parameter, DTensor) and slot != "step":
            placed = torch.zeros_like(parameter.detach())
            start, rows = local_rows(placed)
            rows.copy_(read_part(tensors, key, start, start + rows.numel()).reshape(rows.shape))
        else:
            placed = tensors[key].to(parameter.device, copy=True)
        counts = slot == "step" and f"{name}/state1" in tensors  # bitsandbytes counts with an integer
        optimizer.state[parameter][slot] = int(placed) if counts else placed


def optimizer_parts(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, torch.nn.Parameter]],
    rank: int,
    ranks: int,
) -> Iterator[TensorPart]:
    """This rank's parts of ``optimizer_tensors``; no collective."""
    for name, parameter in named:
        for slot, value in optimizer.state.get(parameter, {}).items():
            yield local_part(f"{name}/{slot}", _as_tensor(value), rank, ranks)


def check_masters(named: Iterable[tuple[str, torch.nn.Parameter]], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless ``tensors`` holds the masters of exactly the trained parameters."""
    shapes = {
        f"{name}/{MASTER}": tuple(full_shape(parameter))
        for name, parameter in named
        if parameter.requires_grad
    }
    if different := sorted(shapes.keys() ^ set(tensors)):
        raise ValueError(
            f"the saved weights and the model's differ in {different[0]!r} and {len(different) - 1} more"
        )
    for key, shape in shapes.items():
        if shape_in(tensors, key) != shape:
            raise ValueError(f"the saved {key} has shape {shape_in(tensors, key)} and the parameter {shape}")


def check_state(trained: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError when optimizer state has parameters or shapes that are not those of ``trained``."""
    unknown = sorted({key.rpartition("/")[0] for key in tensors} - trained.keys())
    if unknown:
        raise ValueError(
            f"the saved optimizer state is of {unknown[0]!r} and {len(unknown) - 1} more that this model "
            "does not train"
        )
    slots: dict[str, set[str]] = {}
    for key in tensors:
        name, _, slot = key.rpartition("/")
        slots.setdefault(name, set()).add(slot)
    if partial := [name for name, present in sorted(slots.items()) if present not in _SLOTS]:
        raise ValueError(
            f"the saved optimizer state of {partial[0]!r} has {sorted(slots[partial[0]])}, which are "
            f"no optimizer's here; AdamW's are {sorted(_SLOTS[0])}"
        )
    for key in tensors:
        name, _, slot = key.rpartition("/")
        shape = tuple(full_shape(trained[name]))
        saved = shape_in(tensors, key)
        if slot not in _UNLIKE_PARAMETER and saved != shape:
            raise ValueError(f"the saved {key} has shape {saved} and the parameter {shape}")


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of the unsharded parameter: ZeRO-3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def restore_schedule(schedule: LambdaLR, updates: int) -> None:
    """Set the learning rates to those after ``updates`` updates."""
    factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base * factor(updates) for base, factor in factors]
    schedule.load_state_dict(
        {**schedule.state_dict(), "last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    )
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
