"""One interface to plain PyTorch, DDP and FSDP2 on one side and DeepSpeed's ZeRO on the other.

Optimizer state and weights are exchanged unsharded, by the bare model's parameter names: a run with any
backend and number of ranks can continue from a checkpoint that another one wrote.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rltrain.learner.optim import (
    check_masters,
    check_state,
    full_shape,
    optimizer_parts,
    optimizer_tensors,
    restore_optimizer,
)
from rltrain.learner.shards import MASTER, gather_rows, local_part, local_rows
from rltrain.shard_sums import Run
from rltrain.types.tensor_parts import TensorPart, read_part, share_of_rank

NamedParameters = list[tuple[str, nn.Parameter]]


class Backend(Protocol):
    """One optimizer update is: for each micro-batch, a ``micro_batch`` block with a forward pass and
    ``backward`` inside; then ``step``.
    """

    policy: Any  # the wrapped model, to be called
    optimizer: torch.optim.Optimizer  # the schedule sets its learning rates

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` over all ranks, which the backend averages."""
        ...

    def step(self) -> tuple[float, bool]:
        """(norm of the whole gradient before clipping, whether the optimizer took the step). Clears
        gradients.

        A gradient whose norm is not finite is dropped. Every rank gets the same result.
        """
        ...

    @property
    def seeks_scale(self) -> bool:
        """Whether float16's loss scale may still fall, so that an overflow is part of the search for it."""
        ...

    def full_weight(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The unsharded float32 master of a weight, on every rank. A collective where weights are sharded.

        dtype: shards are rounded to it before they are gathered; unsharded weights may keep their own.
        """
        ...

    def sum_of_squares(self, tensor: Tensor) -> Tensor:
        """() float64, on the CPU, over this rank's part of the master of a weight. No collective."""
        ...

    def local_run(self, tensor: Tensor, dtype: torch.dtype) -> Run | None:
        """The entries of ``full_weight`` that this rank answers for, rounded to ``dtype``; None: it has none.

        The runs of all ranks are the whole weight, each entry once. No collective.
        """
        ...

    def state(self, named: NamedParameters) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's tensors by ``name/slot``, one unsharded tensor at a time.

        A collective: every rank must iterate over all of them.
        """
        ...

    def restore(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        """Restore a result of ``state``. Raises ValueError when it has other parameters or shapes."""
        ...

    def parts(self, named: NamedParameters) -> Iterator[TensorPart]:
        """This rank's parts of the trained weights' masters, by ``name/master``, and of ``state``.

        The parts of all ranks are every tensor once. Values may be live memory. No collective.
        """
        ...

    def restore_weights(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained weights to the masters in ``tensors``, by ``name/master``. A collective.

        Raises ValueError when there are other parameters or shapes.
        """
        ...


def prepare(
    accelerator: Any, policy: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Backend:
    """Wrap the model for the backend with which accelerate was started."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return DeepSpeedBackend(accelerator, policy, optimizer, max_grad_norm)
    return TorchBackend(accelerator, policy, optimizer, max_grad_norm)


class TorchBackend:
    """One process, DDP and FSDP2. Implements ``Backend``."""

    def __init__(
        self, accelerator: Any, policy: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        self._sharded = accelerator.distributed_type is DistributedType.FSDP
        if self._sharded:
            _keep_statistics_in_float32(accelerator)
        self.policy, self._wrapped = accelerator.prepare(policy, optimizer)
        self.optimizer = optimizer
        self._parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """DDP averages once per update.

        FSDP2 scatters every micro-batch's gradient, so that no rank ever holds a whole one.
        """
        if last or self._sharded or self._accelerator.num_processes == 1:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(self.policy)

    def backward(self, loss: Tensor) -> None:
        # accelerate divides by its own accumulation count, which therefore stays 1.
        self._accelerator.backward(loss)

    def step(self) -> tuple[float, bool]:
        norm = self._clip_gradient()
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        is_finite = math.isfinite(norm)
        # A scaler detects the overflow itself, takes no step and lowers its scale.
        if is_finite or self._accelerator.scaler is not None:
            self._wrapped.step()
        self._wrapped.zero_grad(set_to_none=True)
        return norm, is_finite

    def _clip_gradient(self) -> Tensor:
        """Clip the gradient; returns its norm before that."""
        if self._sharded or self._accelerator.scaler is not None:  # accelerate handles meshes and loss scales
            return self._accelerator.clip_grad_norm_(self.policy.parameters(), self._max_grad_norm)
        return nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)

    @property
    def seeks_scale(self) -> bool:
        return self._accelerator.scaler is not None and self._accelerator.scaler.get_scale() > 1

    def full_weight(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor = tensor.detach()
        return _gather_shards(tensor, dtype) if isinstance(tensor, DTensor) else tensor

    def sum_of_squares(self, tensor: Tensor) -> Tensor:
        return _sum_of_squares(tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def local_run(self, tensor: Tensor, dtype: torch.dtype) -> Run | None:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            return _shard_run(tensor, dtype)
        return _share(tensor, self._accelerator.process_index, self._accelerator.num_processes, dtype)

    def state(self, named: NamedParameters) -> Iterator[tuple[str, Tensor]]:
        return optimizer_tensors(self.optimizer, named)

    def restore(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        restore_optimizer(self.optimizer, named, tensors)

    def parts(self, named: NamedParameters) -> Iterator[TensorPart]:
        rank = self._accelerator.process_index
        ranks = self._accelerator.num_processes
        for name, parameter in named:
            if parameter.requires_grad:
                yield local_part(f"{name}/{MASTER}", parameter, rank, ranks)
        yield from optimizer_parts(self.optimizer, named, rank, ranks)

    def restore_weights(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        check_masters(named, tensors)
        for name, parameter in named:
            if parameter.requires_grad:
                start, local = local_rows(parameter.detach())
                values = read_part(tensors, f"{name}/{MASTER}", start, start + local.numel())
                local.copy_(values.reshape(local.shape))


class DeepSpeedBackend:
    """ZeRO-1, 2 and 3. Implements ``Backend``.

    This class calls the engine directly: accelerate's ``backward`` would take an optimizer step after every
    micro-batch. The engine clips gradients itself, by the same formula, and drops a step whose gradient is
    not finite.
    """

    def __init__(
        self, accelerator: Any, policy: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # The learner counts micro-batches itself.
        config["gradient_accumulation_steps"] = config["train_micro_batch_size_per_gpu"] = 1
        config["train_batch_size"] = accelerator.num_processes
        config["gradient_clipping"] = max_grad_norm
        config["zero_force_ds_cpu_optimizer"] = False  # torch's own, also where it is offloaded
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if config.get("bf16", {}).get("enabled") is True:
            config["bf16"].setdefault(
                "check_grad_overflow", True
            )  # otherwise a NaN gradient reaches the weights
        self._accelerator = accelerator
        self._rank = accelerator.process_index
        self._ranks = accelerator.num_processes
        self.policy, _ = accelerator.prepare(policy, optimizer)
        self.optimizer = optimizer  # its groups now hold the flat shards, and still the learning rates
        is_rmsprop = isinstance(optimizer, torch.optim.RMSprop)
        self._slots = ("square_avg",) if is_rmsprop else ("exp_avg", "exp_avg_sq")  # beside the step

    @property
    def _zero(self) -> Any:
        return self.policy.optimizer

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """ZeRO-2 and 3 reduce every micro-batch's gradient into shards; ``step`` is allowed after the last
        one.
        """
        self.policy.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.policy.backward(loss)

    def step(self) -> tuple[float, bool]:
        self.policy.step()
        if not self.policy.was_step_applied():
            return math.inf, False
        return float(self.policy.get_global_grad_norm()), True

    @property
    def seeks_scale(self) -> bool:
        return self.policy.fp16_enabled() and self._zero.loss_scale > 1

    def full_weight(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        # ZeRO's working copy is its master rounded to this type: no float32 tensor has to be gathered.
        is_rounded = dtype is not None and tensor.dtype == dtype
        is_trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        if is_trained and not is_rounded and not (dtype is not None and hasattr(tensor, "ds_id")):
            master = safe_get_full_fp32_param(tensor)
            assert master is not None, "ZeRO has no master of a parameter that it trains"
            return master.detach()
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        if is_trained and dtype is not None and not is_rounded:
            return _gather_rounded(tensor, dtype)
        with zero.GatheredParameters([tensor]):
            # On its way out the context gives the parameter an empty tensor and leaves this one, which was
            # gathered into a buffer of its own.
            return tensor.detach()

    def sum_of_squares(self, tensor: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            return _sum_of_squares(getattr(tensor, "ds_tensor", tensor))
        if hasattr(tensor, "ds_id"):
            return _sum_of_squares(safe_get_local_fp32_param(tensor))
        mapping = getattr(tensor, "_hp_mapping", None)  # None: other ranks hold the master of this weight
        fragment = None if mapping is None else mapping.get_hp_fragment()
        return torch.zeros((), dtype=torch.float64) if fragment is None else _sum_of_squares(fragment)

    def local_run(self, tensor: Tensor, dtype: torch.dtype) -> Run | None:
        from deepspeed.utils import safe_get_local_fp32_param

        if hasattr(tensor, "ds_id"):
            parameter: Any = tensor
            rounded = tensor.dtype == dtype or not tensor.requires_grad
            shard = parameter.ds_tensor if rounded else safe_get_local_fp32_param(parameter)
            start = self._rank * parameter.ds_tensor.numel()  # equal parts, the last padded
            count = min(max(parameter.ds_numel - start, 0), parameter.ds_tensor.numel())
            return Run(shard.detach().flatten()[:count].to(dtype), start) if count else None
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.dtype != dtype:
            mapping: Any = getattr(tensor, "_hp_mapping", None)  # None: other ranks hold this weight's master
            if mapping is None:
                return None
            fragment = mapping.get_hp_fragment()
            return Run(fragment.detach().flatten().to(dtype), mapping.lp_fragment_address.start)
        return _share(tensor.detach(), self._rank, self._accelerator.num_processes, dtype)

    def set_master(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Set the float32 master of ``parameter``, which the engine made from a rounded weight."""
        flat = weight.flatten()
        self._put(parameter, lambda start, stop: flat[start:stop], None)

    def state(self, named: NamedParameters) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [int(slots["step"]) for slots in self.optimizer.state.values() if "step" in slots]
        self._link_states()
        for name, parameter in named if steps else []:
            if not parameter.requires_grad:
                continue
            for slot in self._slots:
                value = safe_get_full_optimizer_state(parameter, slot)
                assert value is not None, f"ZeRO has no {slot} of {name}, which it trains"
                yield f"{name}/{slot}", value.detach().float()
            yield f"{name}/step", torch.tensor(float(max(steps)))

    def restore(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        check_state(trained, tensors)
        if not tensors:
            return
        self._make_states(next(tensors[key] for key in tensors if key.endswith("/step")))
        for key in tensors:
            name, _, slot = key.rpartition("/")
            if slot != "step":
                self._put(trained[name], partial(read_part, tensors, key), slot)

    def parts(self, named: NamedParameters) -> Iterator[TensorPart]:
        steps = [slots["step"] for slots in self.optimizer.state.values() if "step" in slots]
        self._link_states()
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            for slot in (MASTER, *self._slots) if steps else (MASTER,):
                start, values = self._fragment(parameter, None if slot == MASTER else slot)
                yield TensorPart(f"{name}/{slot}", tuple(full_shape(parameter)), start, values)
            if steps:
                step = torch.tensor([float(max(map(float, steps)))])
                part = TensorPart(f"{name}/step", (), 0, step)
                yield share_of_rank(part, self._rank, self._ranks)

    def restore_weights(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed import zero

        check_masters(named, tensors)
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            key = f"{name}/{MASTER}"
            sharded = hasattr(parameter, "ds_id")
            with zero.GatheredParameters([parameter], modifier_rank=0) if sharded else _NOTHING:
                if not sharded or self._rank == 0:
                    parameter.data.copy_(tensors[key])
            self._put(parameter, partial(read_part, tensors, key), None)

    def _make_states(self, step: Tensor) -> None:
        """Create the optimizer's slots for every flat shard of this rank, as its first step would."""
        is_stage3 = self.policy.zero_optimization_stage() == 3
        zero = self._zero
        shards = zero.fp32_partitioned_groups_flat if is_stage3 else zero.single_partition_of_fp32_groups
        for flat in shards:
            empty = {slot: torch.zeros_like(flat) for slot in self._slots}
            self.optimizer.state[flat] = {"step": step.clone(), **empty}
        self._link_states()

    def _link_states(self) -> None:
        """Tell ZeRO-1 and 2 where each parameter's optimizer state is.

        DeepSpeed 0.19 does so after the first parameter group's first step, when the other groups have no
        state yet.
        """
        if self.policy.zero_optimization_stage() < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _fragment(self, parameter: Any, slot: str | None) -> tuple[int, Tensor]:
        """This rank's part of a master (slot None) or optimizer state: its start, and the live values
        without padding, (n,).
        """
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if hasattr(parameter, "ds_tensor"):  # equal parts, the last padded
            size = parameter.ds_tensor.numel()
            start = min(self._rank * size, parameter.ds_numel)
            if slot is None:
                values = safe_get_local_fp32_param(parameter)
            else:
                values = safe_get_local_optimizer_state(parameter, slot)
            return start, values.detach()[: parameter.ds_numel - start]
        mapping = parameter._hp_mapping
        if mapping is None:  # other ranks hold it
            return 0, torch.empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(slot).detach()

    def _put(self, parameter: Any, read: Callable[[int, int], Tensor], slot: str | None) -> None:
        """Set this rank's part of the float32 master (slot None) or optimizer state of ``parameter``.

        read(start, stop): the numbers in that range, (stop - start,).
        """
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        start, held = self._fragment(parameter, slot)
        values = read(start, start + held.numel()).to(held) if held.numel() else held
        if not hasattr(parameter, "ds_tensor"):
            held.copy_(values)
            return
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=held.dtype, device=held.device)
        padded[: values.numel()] = values
        if slot is None:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, slot)


_NOTHING = contextlib.nullcontext()


def _gather_rounded(parameter: Any, dtype: torch.dtype) -> Tensor:
    """The full weight of a ZeRO-3 parameter; its master's shards are rounded to ``dtype`` before they are
    gathered.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    shard = safe_get_local_fp32_param(parameter)
    assert shard is not None, "ZeRO has no master of a parameter that it trains"
    group = parameter.ds_process_group
    flat = torch.empty(
        shard.numel() * torch.distributed.get_world_size(group), dtype=dtype, device=shard.device
    )
    torch.distributed.all_gather_into_tensor(flat, shard.detach().flatten().to(dtype), group=group)
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def _shard_run(tensor: DTensor, dtype: torch.dtype) -> Run | None:
    """This rank's rows of a weight that is split along its first dimension; replicas count once."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh of a weight that it holds"
    for place, index in zip(tensor.placements, coordinate, strict=True):
        assert place.is_replicate() or place.is_shard(0), f"a weight is placed as {place}, not split by rows"
        if place.is_replicate() and index > 0:
            return None
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    values = tensor.to_local().flatten().to(dtype)
    return Run(values, offset[0] * math.prod(tensor.shape[1:])) if values.numel() else None


def _share(tensor: Tensor, rank: int, ranks: int, dtype: torch.dtype) -> Run | None:
    """This rank's share of the rows of a weight that every rank holds whole."""
    rows = tensor.shape[0] if tensor.ndim else 1
    start = rows * rank // ranks
    stop = rows * (rank + 1) // ranks
    columns = tensor.numel() // rows
    values = tensor.reshape(rows, -1)[start:stop].flatten().to(dtype)
    return Run(values, start * columns) if values.numel() else None


def _gather_shards(shard: DTensor, dtype: torch.dtype | None) -> Tensor:
    """The full weight; its shards are rounded to ``dtype`` before they are gathered."""
    return gather_rows(shard if dtype is None else shard.to(dtype))


def _sum_of_squares(part: Tensor) -> Tensor:
    """() float64, on the CPU."""
    return torch.linalg.vector_norm(part.detach(), dtype=torch.float64).square().cpu()


def set_mode(policy: Any, *, training: bool) -> None:
    """``policy.train(training)``, but only if it changes the mode, since it visits every module."""
    if policy.training is not training:
        policy.train(training)


def reshard(policy: nn.Module) -> None:
    """Shard the weights that FSDP2 and ZeRO-3 leave unsharded after a forward pass without a backward pass.

    Until then an FSDP2 model's parameters are not the optimizer's.
    """
    release = getattr(policy, "empty_partition_cache", None)  # of DeepSpeed's engine
    if release is not None:
        release()
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _keep_statistics_in_float32(accelerator: Any) -> None:
    """Set FSDP2's mixed precision: it gathers and multiplies bfloat16 weights, sums gradients in float32, and
    leaves the model's output as it is.

    accelerate's own policy would round the log-probs to bfloat16, and the sums over ranks too.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
