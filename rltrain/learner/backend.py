"""One interface to plain PyTorch, DDP and FSDP2 on one side and DeepSpeed's ZeRO on the other.

Optimizer state and weights are exchanged unsharded, by the bare model's parameter names: a run with any
backend and number of ranks can continue from a checkpoint that another one wrote.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rltrain.learner.optim import check_state, optimizer_tensors, restore_optimizer

NamedParameters = list[tuple[str, nn.Parameter]]


class Backend(Protocol):
    """One optimizer update is: for each micro-batch, a ``micro_batch`` block with a forward pass and
    ``backward`` inside; then ``step``.
    """

    policy: Any  # the wrapped model, to be called
    optimizer: torch.optim.AdamW  # the schedule sets its learning rates

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

    def state(self, named: NamedParameters) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's tensors by ``name/slot``, one unsharded tensor at a time.

        A collective: every rank must iterate over all of them.
        """
        ...

    def restore(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        """Restore a result of ``state``. Raises ValueError when it has other parameters or shapes."""
        ...


def prepare(
    accelerator: Any, policy: nn.Module, optimizer: torch.optim.AdamW, max_grad_norm: float
) -> Backend:
    """Wrap the model for the backend with which accelerate was started."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return DeepSpeedBackend(accelerator, policy, optimizer, max_grad_norm)
    return TorchBackend(accelerator, policy, optimizer, max_grad_norm)


class TorchBackend:
    """One process, DDP and FSDP2. Implements ``Backend``."""

    def __init__(
        self, accelerator: Any, policy: nn.Module, optimizer: torch.optim.AdamW, max_grad_norm: float
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

    def state(self, named: NamedParameters) -> Iterator[tuple[str, Tensor]]:
        return optimizer_tensors(self.optimizer, named)

    def restore(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        restore_optimizer(self.optimizer, named, tensors)


class DeepSpeedBackend:
    """ZeRO-1, 2 and 3. Implements ``Backend``.

    This class calls the engine directly: accelerate's ``backward`` would take an optimizer step after every
    micro-batch. The engine clips gradients itself, by the same formula, and drops a step whose gradient is
    not finite.
    """

    def __init__(
        self, accelerator: Any, policy: nn.Module, optimizer: torch.optim.AdamW, max_grad_norm: float
    ) -> None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # The learner counts micro-batches itself.
        config["gradient_accumulation_steps"] = config["train_micro_batch_size_per_gpu"] = 1
        config["train_batch_size"] = accelerator.num_processes
        config["gradient_clipping"] = max_grad_norm
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if config.get("bf16", {}).get("enabled") is True:
            config["bf16"].setdefault(
                "check_grad_overflow", True
            )  # otherwise a NaN gradient reaches the weights
        self._rank = accelerator.process_index
        self.policy, _ = accelerator.prepare(policy, optimizer)
        self.optimizer = optimizer  # its groups now hold the flat shards, and still the learning rates

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
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and not is_rounded:
            master = safe_get_full_fp32_param(tensor)
            assert master is not None, "ZeRO has no master of a parameter that it trains"
            return master.detach()
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        with zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def sum_of_squares(self, tensor: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            return _sum_of_squares(getattr(tensor, "ds_tensor", tensor))
        if hasattr(tensor, "ds_id"):
            return _sum_of_squares(safe_get_local_fp32_param(tensor))
        mapping = getattr(tensor, "_hp_mapping", None)  # None: other ranks hold the master of this weight
        fragment = None if mapping is None else mapping.get_hp_fragment()
        return torch.zeros((), dtype=torch.float64) if fragment is None else _sum_of_squares(fragment)

    def set_master(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Set the float32 master of ``parameter``, which the engine made from a rounded weight."""
        self._put(parameter, weight, None)

    def state(self, named: NamedParameters) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [int(slots["step"]) for slots in self.optimizer.state.values() if "step" in slots]
        self._link_states()
        for name, parameter in named if steps else []:
            if not parameter.requires_grad:
                continue
            for slot in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(parameter, slot)
                assert value is not None, f"ZeRO has no {slot} of {name}, which it trains"
                yield f"{name}/{slot}", value.detach().float()
            yield f"{name}/step", torch.tensor(float(max(steps)))

    def restore(self, named: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        check_state(trained, tensors)
        if not tensors:
            return
        self._make_states(next(value for key, value in tensors.items() if key.endswith("/step")))
        for key, value in tensors.items():
            name, _, slot = key.rpartition("/")
            if slot != "step":
                self._put(trained[name], value, slot)

    def _make_states(self, step: Tensor) -> None:
        """Create AdamW's slots for every flat shard of this rank, as its first step would."""
        is_stage3 = self.policy.zero_optimization_stage() == 3
        zero = self._zero
        shards = zero.fp32_partitioned_groups_flat if is_stage3 else zero.single_partition_of_fp32_groups
        for flat in shards:
            empty = {slot: torch.zeros_like(flat) for slot in ("exp_avg", "exp_avg_sq")}
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

    def _put(self, parameter: Any, value: Tensor, slot: str | None) -> None:
        """Set the float32 master (slot None) or optimizer state of ``parameter`` to this rank's part of
        ``value``.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(device=self.policy.device, dtype=torch.float32)
        if hasattr(parameter, "ds_tensor"):  # equal parts, the last padded
            size = parameter.ds_tensor.numel()
            part = torch.zeros(size, dtype=value.dtype, device=value.device)
            share = value.flatten()[self._rank * size : (self._rank + 1) * size]
            part[: share.numel()] = share
            if slot is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, slot)
        elif slot is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, slot)


def _gather_shards(shard: DTensor, dtype: torch.dtype | None) -> Tensor:
    """The full weight; its shards are rounded to ``dtype`` before they are gathered."""
    rounded: Any = shard if dtype is None else shard.to(dtype)
    return rounded.full_tensor()


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
