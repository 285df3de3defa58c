"""A model that an optimizer trains: weights, optimizer, schedule, backend, ranks and saved state.

Each learner holds one; ``update_step.py`` changes its weights. Every rank holds a whole step (token ids and
small tensors) and plans the same micro-batches, so that results do not depend on the number of ranks: each
rank runs its share, and counts, losses and statistics are sums over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rltrain.config.capacity.recomputation import recomputed_layers
from rltrain.config.schema import Adapter, LearnerCore, Model
from rltrain.errors import UserError
from rltrain.learner.adapter import AdapterLayers, inject_adapter, quantization_config, target_paths
from rltrain.learner.backend import Backend, DeepSpeedBackend, prepare
from rltrain.learner.checksum import digest_of_sums, sum_parts
from rltrain.learner.degree_head import DEGREE_HEAD
from rltrain.learner.forward import PolicyForward, resolve_layout
from rltrain.learner.layer_kernels import use_kernels
from rltrain.learner.loading import load_causal_lm, require_repeatable
from rltrain.learner.optim import (
    build_optimizer,
    build_schedule,
    full_shape,
    hidden_matrices,
    restore_schedule,
)
from rltrain.learner.packing import Layout, MicroBatch, build
from rltrain.learner.precision import COMPUTE_DTYPES, ROUNDING, computes_throughout, round_frozen
from rltrain.learner.ranks import (
    fill_other_ranks,
    make_accelerator,
    mixed_precision,
    require_backend_of,
    require_sharable_storage,
    sharded_loading,
)
from rltrain.learner.shards import MASTER, gather_rows, put_full
from rltrain.model_limits import context_of
from rltrain.shard_sums import ShardSums
from rltrain.tensor_ops import Fingerprint
from rltrain.types.policy import TokenRows
from rltrain.types.tensor_parts import TensorPart, select_tensors
from rltrain.watchdog import Deadline, no_deadline
from rltrain.weight_names import CheckpointNames

__all__ = ["ModelOwner", "NonFiniteError", "TrainedModel", "load_policy"]


_PROBE_TOKENS = 128
_HEAD_WEIGHT = "weight"  # beside the optimizer's slots: of a head that no model folder holds


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not a finite number."""


def load_policy(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """The recipe's model, a causal language model. dtype: of matrix products."""
    quantization = None if model.adapter is None else quantization_config(model.adapter.quantize, dtype)
    return load_causal_lm(model.path, model.revision, model.attention, quantization)


class TrainedModel:
    """A transformers model with its optimizer; ``version``, the number of updates taken, identifies its
    weights.

    load: loads the transformers model for products in a dtype. wrap: makes the module around it that takes
    micro-batches.
    adapter_from: folder of the adapter's weights to continue with; None: a new one, if the model has one.
    deadline: wraps every wait for the other ranks that is not inside a forward or backward pass.
    """

    def __init__(
        self,
        model: Model,
        settings: LearnerCore,
        *,
        total_updates: int,
        seed: int,
        load: Callable[[Model, torch.dtype], PreTrainedModel] = load_policy,
        wrap: Callable[[PreTrainedModel], PolicyForward] = PolicyForward,
        adapter_from: Path | None = None,
        deadline: Deadline = no_deadline,
    ) -> None:
        self.settings = settings
        self.seed = seed
        self._load = load
        self._origin = model
        self.deadline = deadline
        self.accelerator: Any = make_accelerator(mixed_precision(settings.precision))
        if model.attention == "flex_attention" and self.device.type == "cpu":
            raise UserError(
                "model.attention is flex_attention, whose gradient PyTorch computes on GPUs only, and there "
                "is none; set it to auto"
            )
        require_backend_of(settings.optimizer.name)

        torch.manual_seed(seed)
        pretrained = self._load_model(model)
        self.names = CheckpointNames(pretrained)
        self.adapter = self._build_adapter(pretrained, model.adapter, adapter_from)
        self.layout: Layout = resolve_layout(settings.layout, pretrained)
        if settings.gradient_checkpointing:
            pretrained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        use_kernels(pretrained, settings.kernels)

        self.unwrapped_model = wrap(pretrained)  # without the backend's wrapper
        starts = self._adapter_starts()
        optimizer = build_optimizer(
            self._named_parameters(),
            settings.optimizer,
            self.unwrapped_model.learning_rates,
            hidden_matrices(pretrained) if settings.optimizer.name == "muon" else (),
        )
        self.schedule = build_schedule(optimizer, settings.optimizer, total_updates)
        max_grad_norm = settings.optimizer.max_grad_norm
        self.backend: Backend = prepare(self.accelerator, self.unwrapped_model, optimizer, max_grad_norm)
        self.wrapped_model = self.backend.policy  # the module for forward passes
        self.optimizer = self.backend.optimizer
        self.wrapped_model.train()  # every module: transformers loads its own in eval mode
        if isinstance(self.backend, DeepSpeedBackend) and self.precision != "no":
            self._set_masters(model, starts)

        self.version = 0
        self._nonfinite_in_a_row = 0
        self._shard_sums: dict[torch.dtype, ShardSums] = {}

        probe = build(_probe_row(self.model.config), [0], layout=self.layout, device=self.device)
        require_repeatable(self.wrapped_model, probe, path=model.path, tolerance=ROUNDING[self.precision])

    def _load_model(self, model: Model) -> PreTrainedModel:
        """The model in the form that the backend wraps. A quantised one is read by every rank: what
        bitsandbytes keeps beside the weights cannot be sent.
        """
        if model.adapter is not None and model.adapter.quantize != "none":
            require_sharable_storage(model.adapter.quantize)
            return self._load(model, self.compute_dtype)
        with sharded_loading(self.accelerator):
            pretrained = self._load(model, self.compute_dtype)
        fill_other_ranks(pretrained, self.accelerator)
        return pretrained

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return COMPUTE_DTYPES[self.precision]

    @property
    def precision(self) -> str:
        """The precision of autocast, in accelerate's terms: "no" for float32, "bf16", "fp16"."""
        return str(self.accelerator.mixed_precision)

    def recompute(self, share: float) -> None:
        """Let gradient checkpointing compute only the first ``share`` of the layers again.

        The last ones keep their activations, which are the first that the backward pass needs and frees.
        """
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[recomputed_layers(len(layers), share) :]:
            layer.gradient_checkpointing = False

    @property
    def head_chunk(self) -> int:
        """Tokens whose logits exist at the same time."""
        return self.settings.head_chunk_on(self.device.type)

    @property
    def probe_row(self) -> TokenRows:
        """A fixed row for tests of the model."""
        return _probe_row(self.model.config)

    # ranks --------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def gather(self, objects: Sequence[Any]) -> list[Any]:
        """The lists of all ranks, concatenated in rank order."""
        if self.world_size == 1:
            return list(objects)
        with self.deadline("the other ranks", "to hand over their objects"):
            return gather_object(list(objects))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.world_size == 1:
            return value
        with self.deadline("rank 0", "to hand over its value"):
            return broadcast_object_list([value])[0]

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of all ranks' ``value``, on the model's device."""
        with self.deadline("the other ranks", "to add their numbers"):
            return self.accelerator.reduce(value.to(self.device), "sum")

    def sum_each(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all ranks, on the CPU: a collective for each name, in an order equal on every rank."""
        return {name: self.sum_over_ranks(value).cpu() for name, value in shares.items()}

    def sum_scalars(self, shares: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums of scalars over all ranks, in one collective and one transfer."""
        names = sorted(shares)
        stacked = torch.stack([shares[name].detach().float().to(self.device) for name in names])
        return dict(zip(names, self.sum_over_ranks(stacked).tolist(), strict=True))

    # weights ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside every wrapper."""
        return self.unwrapped_model.inner

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each weight on every rank, in float32 like the optimizer's master, under its checkpoint name.

        Weights that transformers fuses are split; an adapter is merged. A collective: every rank must iterate
        over all weights, of which one at a time is gathered. dtype: shards are rounded to it before they are
        gathered.
        """
        return self.names.to_checkpoint(self.model_weights(dtype))

    def model_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """``weights`` under the names inside the model."""
        if self.adapter is not None:
            yield from self.adapter.model_weights(self._gather, dtype, merged=True)
            return
        for name, tensor in self._model_state().items():
            full = self._gather(tensor, dtype, name)
            yield name, full
            del full

    def base_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """As ``weights``, of the model under the adapter, which is not trained."""
        return self.names.to_checkpoint(self.base_model_weights(dtype))

    def base_model_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """``base_weights`` under the names inside the model."""
        assert self.adapter is not None
        return self.adapter.model_weights(self._gather, dtype, merged=False)

    def adapter_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The adapter's float32 masters by peft's names, on every rank. A collective like ``weights``.

        dtype: not read; an adapter is small, and rounded where it is used.
        """
        del dtype
        assert self.adapter is not None
        return self.adapter.weights(self._gather)

    def adapter_config(self) -> dict[str, Any]:
        """The content of the adapter's adapter_config.json."""
        assert self.adapter is not None
        return self.adapter.config(self._origin)

    def _gather(self, tensor: Tensor, dtype: torch.dtype | None = None, name: str = "a weight") -> Tensor:
        """``Backend.full_weight``, with a deadline."""
        with self.deadline("the other ranks", f"to hand over their shards of {name}"):
            return self.backend.full_weight(tensor, dtype)

    def _build_adapter(
        self, pretrained: PreTrainedModel, settings: Adapter | None, adapter_from: Path | None
    ) -> AdapterLayers | None:
        """The adapter, inside ``pretrained``; None without settings. Its start is equal on every rank."""
        if settings is None:
            return None
        if settings.targets == "kappatune":  # other ranks may have no values
            paths = self.broadcast(target_paths(pretrained, settings) if self.rank == 0 else None)
        else:
            paths = target_paths(pretrained, settings)
        torch.manual_seed(self.seed)
        adapter = inject_adapter(pretrained, settings, paths)
        if adapter_from is not None:
            adapter.load(adapter_from)
        round_frozen(pretrained, self.compute_dtype, throughout=computes_throughout(self.accelerator))
        return adapter

    def weight_fingerprints(self, dtype: torch.dtype) -> dict[str, Fingerprint]:
        """Of every weight rounded to ``dtype``, by checkpoint name, a tied weight's under each of its names.

        From the shards: a collective that adds two numbers a weight and gathers none.
        """
        runs = {
            name: run
            for name, tensor in self._model_state().items()
            if (run := self.backend.local_run(tensor, dtype)) is not None
        }
        if dtype not in self._shard_sums:
            missing = self.names.shapes.keys() - self.names.blocks.keys()
            if missing:
                raise UserError(
                    f"{min(missing)!r} and {len(missing) - 1} other weights of the checkpoint are no blocks "
                    "of the model's tensors, so that their shards cannot be proved; use rollout.engine vllm"
                )
            starts = self.gather([{name: run.start for name, run in runs.items()}])
            self._shard_sums[dtype] = ShardSums(self.names.blocks, starts)
        sums = self._shard_sums[dtype]
        return sums.fingerprints(self.sum_over_ranks(sums.shares(runs, self.device)))

    def weight_norms(self) -> tuple[float, ...]:
        """The norm of each weight's master, in float64, in the order of ``model_weights``; of an adapter's
        weights where there is one.

        An update that changes a weight changes its norm. Replicas are counted once per rank. A collective
        that gathers no weight.
        """
        weights = list(self._model_state().values())
        if self.adapter is not None:
            weights = [weight for layer in self.adapter.layers.values() for weight in layer.weights]
        squares = [self.backend.sum_of_squares(weight) for weight in weights]
        return tuple(self.sum_over_ranks(torch.stack(squares)).sqrt().tolist())

    def _model_state(self) -> dict[str, Tensor]:
        """The live weights by name inside the model, without those of a head beside it."""
        state = self.unwrapped_model.state_dict(keep_vars=True)
        prefix = "model."
        return {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }

    def _head_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters of a head beside the model, which no model folder holds."""
        return [(name, weight) for name, weight in self._named_parameters() if name.startswith(DEGREE_HEAD)]

    def _adapter_starts(self) -> dict[str, Tensor]:
        """Copies of the adapter's float32 weights, by name inside the model, before a backend rounds them."""
        if self.adapter is None:
            return {}
        named = self._named_parameters()
        return {name: weight.detach().clone() for name, weight in named if weight.requires_grad}

    def _set_masters(self, model: Model, starts: Mapping[str, Tensor]) -> None:
        """Give the optimizer the float32 weights of the model folder, or of the adapter (``starts``), where
        the backend rounded its own copies, and the model float32 buffers: ZeRO rounds the frequencies of
        rotary positions too.

        Rank 0 reads them and sends one at a time: no other rank has a second model in its memory.
        """
        torch.manual_seed(self.seed)  # a head that starts at random is the same as before
        source = self._load(model, self.compute_dtype) if self.rank == 0 else None
        weights = starts
        if self.adapter is None:
            weights = {} if source is None else source.state_dict()
        assert isinstance(self.backend, DeepSpeedBackend)
        for name, parameter in self._named_parameters():
            if parameter.requires_grad:
                weight = self._from_rank_0(name, weights.get(name), full_shape(parameter))
                self.backend.set_master(parameter, weight)

        buffers = {} if source is None else dict(source.named_buffers())
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                buffer.data = self._from_rank_0(name, buffers.get(name), buffer.shape)

    def _from_rank_0(self, name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor:
        """Rank 0's ``tensor`` in float32, on every rank's device. None on the other ranks."""
        if tensor is None:
            full = torch.empty(shape, device=self.device)
        else:
            full = tensor.detach().float().to(self.device)
        with self.deadline("rank 0", f"to send {name}"):
            received: Any = broadcast(full)
        return received

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters by their names in the transformers model, without those of wrappers."""
        parameters = self.unwrapped_model.named_parameters()
        return [(name.removeprefix("model."), parameter) for name, parameter in parameters]

    # state --------------------------------------------------------------------------------------------------

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's tensors by parameter name and slot, one unsharded tensor at a time.

        A collective: every rank must iterate over all of them. Any backend and number of ranks can restore
        them.
        """
        stream = self.backend.state(self._named_parameters())
        while True:
            with self.deadline("the other ranks", "to hand over their shards of the optimizer's state"):
                item = next(stream, None)
            if item is None:
                break
            yield item
            del item
        for name, weight in self._head_parameters():
            yield f"{name}/{_HEAD_WEIGHT}", gather_rows(weight).detach()

    def state(self) -> dict[str, Any]:
        """The state on which an update depends besides the weights and ``optimizer_state``, as JSON."""
        scaler = self.accelerator.scaler
        return {
            "version": self.version,
            "schedule": self.schedule.last_epoch,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def parts(self) -> Iterator[TensorPart]:
        """This rank's parts of the trained weights and of ``optimizer_state``, live memory; no collective."""
        return self.backend.parts(self._named_parameters())

    def weights_digest(self) -> str:
        """A checksum of every bit of the trained weights, the same however ranks divide them. A collective
        that gathers no weight.
        """
        masters = (part for part in self.parts() if part.name.endswith(f"/{MASTER}"))
        return digest_of_sums(self.gather([sum_parts(masters)]))

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore ``optimizer_state`` and ``state``.

        Weights are restored where ``tensors`` holds those that ``parts`` gave; else they are those that this
        object loaded. Raises ValueError for another model's state.
        """
        heads = select_tensors(tensors, lambda name: name if name.endswith(f"/{_HEAD_WEIGHT}") else None)
        tensors = select_tensors(tensors, lambda name: None if name in heads else name)
        for name, weight in self._head_parameters():
            if f"{name}/{_HEAD_WEIGHT}" in heads:
                put_full(weight, heads[f"{name}/{_HEAD_WEIGHT}"].to(self.device))
        masters = select_tensors(tensors, lambda name: name if name.endswith(f"/{MASTER}") else None)
        state = select_tensors(tensors, lambda name: None if name in masters else name)
        if masters:
            with torch.no_grad():
                self.backend.restore_weights(self._named_parameters(), masters)
        self.backend.restore(self._named_parameters(), state)
        restore_schedule(self.schedule, values["schedule"])
        self.version = values["version"]
        self._nonfinite_in_a_row = values["nonfinite_in_a_row"]
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])

    # forward and step ---------------------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        temperature: float,
        wants: frozenset[str],
    ) -> dict[str, Tensor]:
        """The trained model's statistics of a micro-batch, with a gradient where gradients are enabled."""
        chunk = self.head_chunk
        return self.wrapped_model(micro_batch, temperature=temperature, wants=wants, chunk=chunk)

    def step(self, loss: float) -> tuple[float, bool]:
        """(norm of the gradient before clipping, whether the optimizer took the step), equal on every rank.

        A gradient that is not finite is dropped. loss: for the message. Raises NonFiniteError after
        ``max_nonfinite`` dropped updates in a row; an overflow in float16's search for its loss scale does
        not count.
        """
        grad_norm, stepped = self.backend.step()
        if stepped:
            self.schedule.step()
            self.version += 1
            self._nonfinite_in_a_row = 0
        elif not (math.isfinite(loss) and self.backend.seeks_scale):
            self._nonfinite_in_a_row += 1

        if self._nonfinite_in_a_row >= self.settings.max_nonfinite:
            raise NonFiniteError(
                f"{self._nonfinite_in_a_row} updates in a row had a non-finite loss ({loss}) or gradient "
                f"norm ({grad_norm}); the weights are those of version {self.version}. Lower "
                "learner.optimizer.lr, or look at the rewards and at learner.precision"
            )
        return grad_norm, stepped


def _probe_row(config: Any) -> TokenRows:
    """A row for a first test of the model, of ``_PROBE_TOKENS`` tokens, or fewer if its context is
    shorter.
    """
    context = context_of(config)
    vocabulary = config.get_text_config().vocab_size
    count = _PROBE_TOKENS if context is None else max(min(_PROBE_TOKENS, context.tokens), 2)
    first, *others = ((7 * place + 3) % vocabulary for place in range(count))
    return TokenRows(((first,),), (tuple(others),))


class ModelOwner:
    """Base class of learners: gives access to the trained model that a learner holds."""

    trained: TrainedModel

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside every wrapper."""
        return self.trained.model

    @property
    def version(self) -> int:
        """Optimizer updates taken."""
        return self.trained.version

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.trained.lr

    @property
    def device(self) -> torch.device:
        return self.trained.device

    @property
    def rank(self) -> int:
        return self.trained.rank

    @property
    def world_size(self) -> int:
        return self.trained.world_size

    def gather(self, objects: Sequence[Any]) -> list[Any]:
        """The lists of all ranks, concatenated in rank order."""
        return self.trained.gather(objects)

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        return any(self.gather([flag]))

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """``TrainedModel.weights``: a collective, in which every rank must iterate over all weights."""
        return self.trained.weights(dtype)

    def model_weights(self) -> Iterator[tuple[str, Tensor]]:
        """``TrainedModel.model_weights``: a collective, in which every rank must iterate over all weights."""
        return self.trained.model_weights()

    def adapter_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """``TrainedModel.adapter_weights``: a collective, in which every rank must iterate over all."""
        return self.trained.adapter_weights(dtype)

    def weight_norms(self) -> tuple[float, ...]:
        """``TrainedModel.weight_norms``: a collective."""
        return self.trained.weight_norms()

    @property
    def names(self) -> CheckpointNames:
        """The names of the weights in a checkpoint."""
        return self.trained.names

    def weight_fingerprints(self, dtype: torch.dtype) -> dict[str, Fingerprint]:
        """``TrainedModel.weight_fingerprints``: a collective."""
        return self.trained.weight_fingerprints(dtype)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """``TrainedModel.optimizer_state``: a collective; every rank must iterate over all tensors."""
        return self.trained.optimizer_state()

    def parts(self) -> Iterator[TensorPart]:
        """``TrainedModel.parts``."""
        return self.trained.parts()

    def state(self) -> dict[str, Any]:
        """``TrainedModel.state``."""
        return self.trained.state()

    def weights_digest(self) -> str:
        """``TrainedModel.weights_digest``: a collective."""
        return self.trained.weights_digest()

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """``TrainedModel.restore``."""
        self.trained.restore(tensors, values)
