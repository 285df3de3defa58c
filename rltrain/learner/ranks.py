"""This process as one of several ranks: joining the others, and the board on which each reports a heartbeat.

``accelerate launch`` states the requested backend in environment variables. On a machine without a GPU
accelerate would silently ignore FSDP and DeepSpeed and use plain DDP, or start ranks that do not know of each
other. This module starts the requested backend over gloo, so that all of them can be tested without a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
)
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from rltrain.errors import UserError
from rltrain.learner.loading import without_weights
from rltrain.process import Process, no_meeting
from rltrain.watchdog import Deadline, no_deadline

Kind = Literal["ddp", "fsdp2", "deepspeed"]
Offload = Literal["nothing", "optimizer", "all"]

# torch reads them when it first allocates on a GPU; the second is the older name
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_RANK_0_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # transformers reads it


def started_ranks() -> int:
    """How many ranks the launcher started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def requested_backend() -> Kind:
    """The backend that the launcher's environment requests."""
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    return "fsdp2" if _is_set("ACCELERATE_USE_FSDP") else "ddp"


def connect(deadline_seconds: float) -> None:
    """Join the other ranks, once per process, before any other code reads their number or uses a GPU.

    deadline_seconds: a collective that a peer does not join fails after this time.
    """
    _grow_segments()
    if PartialState._shared_state or started_ranks() == 1:
        return
    on_cpu = not torch.cuda.is_available()
    if on_cpu and requested_backend() == "deepspeed":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # accelerate 1.15 ignores DeepSpeed when told cpu=True
        os.environ.pop("ACCELERATE_USE_CPU", None)
        _disable_compiled_collectives()
    timeout = InitProcessGroupKwargs(
        backend="gloo" if on_cpu else None, timeout=timedelta(seconds=deadline_seconds)
    ).to_kwargs()
    PartialState(cpu=on_cpu and requested_backend() != "deepspeed", **timeout)


def _grow_segments() -> None:
    """Let torch's allocator grow its segments on a GPU, since micro-batches of ever other shapes would break
    up segments of fixed sizes. What the user has set stays.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def request_offload(offload: Offload) -> None:
    """Ask the launcher's backend for ``learner.offload``; call it before ``connect``.

    The launcher's own settings stay where the recipe offloads nothing. Raises UserError where the backend
    cannot.
    """
    if offload == "nothing":
        return
    kind = requested_backend() if started_ranks() > 1 else "one process"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if kind == "deepspeed" else None
    possible = {"fsdp2": ("all",), "2": ("optimizer",), "3": ("optimizer", "all")}.get(stage or kind, ())
    if offload not in possible:
        what = f"ZeRO-{stage}" if stage else kind
        remedy = f"set it to {' or '.join(possible)}" if possible else "launch fsdp2, zero2 or zero3"
        raise UserError(f"learner.offload is {offload}, which {what} cannot; {remedy}, or set it to nothing")
    if kind == "fsdp2":
        os.environ["FSDP_OFFLOAD_PARAMS"] = "true"  # accelerate then also connects the ranks' CPUs
        return
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"
    if offload == "all":
        os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] = "cpu"


def require_backend_of(optimizer: str) -> None:
    """Raises UserError for an optimizer that cannot update weights as the backend divides them."""
    kind = requested_backend() if started_ranks() > 1 else "ddp"
    reasons = {
        "adamw_8bit": f"whose blocks {kind} would divide anywhere; use adamw, or launch ddp",
        "muon": f"which needs whole matrices, and {kind} divides them; use adamw, or launch ddp",
    }
    if kind != "ddp" and optimizer in reasons:
        raise UserError(f"an optimizer.name is {optimizer}, {reasons[optimizer]}")


def require_no_zero(key: str) -> None:
    """Raises UserError under ZeRO, which makes its masters of a model folder's weights alone."""
    if started_ranks() > 1 and requested_backend() == "deepspeed":
        raise UserError(
            f"{key} trains a head beside the model, of which ZeRO has no master; launch ddp or fsdp2"
        )


def require_sharable_storage(quantize: str) -> None:
    """Raises UserError where the backend would change the bytes in which bitsandbytes keeps weights: ZeRO
    rounds every tensor of a model, and FSDP2 divides numbers but no int8 rows with their scales.
    """
    kind = requested_backend() if started_ranks() > 1 else "ddp"
    if kind == "deepspeed" or (kind == "fsdp2" and quantize == "int8"):
        remedy = "launch ddp" if quantize == "int8" else "launch ddp or fsdp2"
        raise UserError(
            f"model.adapter.quantize is {quantize}, whose storage {kind} would change; {remedy}, or set it "
            "to none"
        )


def mixed_precision(precision: str) -> str:
    """accelerate's name for a recipe's ``learner.precision`` on this machine.

    Raises UserError where accelerate would compute in another precision.
    """
    on_gpu = torch.cuda.is_available()
    if precision == "float16" and not on_gpu:
        raise UserError(
            "learner.precision is float16 and there is no GPU: on a CPU it would run in float32; set it to "
            "float32 or bfloat16"
        )
    automatic = "bf16" if on_gpu else "no"
    names = {"auto": automatic, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return names[precision]


def make_accelerator(mixed_precision: str) -> Any:
    """accelerate's ``Accelerator`` for the requested backend; call ``connect`` first.

    Afterwards transformers loads unsharded models on every rank, as references and engines need them;
    ``sharded_loading`` is for the trained model. Raises RuntimeError if accelerate uses another backend.
    """
    # DDP's buckets hold the gradients, which would otherwise exist twice
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[buckets])
    kind = requested_backend()
    ranks = started_ranks()
    if ranks > 1 and kind == "fsdp2" and accelerator.distributed_type is DistributedType.MULTI_CPU:
        # accelerate 1.15 supports FSDP on GPUs only, and copies the type from its PartialState at every read
        # of its state.
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )
        plugin = FullyShardedDataParallelPlugin()
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
        accelerator.state.fsdp_plugin = plugin
    actual = accelerator.distributed_type
    expected = {"fsdp2": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}.get(kind)
    if ranks > 1 and expected is not None and actual is not expected:
        raise RuntimeError(
            f"{kind} was requested, but accelerate runs {actual}: compare the versions installed with "
            "requirements/"
        )
    if accelerator.num_processes != ranks:
        raise RuntimeError(
            f"the launcher started {ranks} ranks, but this one knows of {accelerator.num_processes}"
        )
    unset_hf_deepspeed_config()
    os.environ.pop(_RANK_0_ONLY, None)
    return accelerator


@contextlib.contextmanager
def sharded_loading(accelerator: Any) -> Iterator[None]:
    """Inside, a model loads in the form that its backend needs: ZeRO-3 shards it at once; for the others
    rank 0 reads it, and the other ranks' copies are on the meta device until ``fill_other_ranks``.
    """
    if _divides_while_loading(accelerator):
        set_hf_deepspeed_config(accelerator.state.deepspeed_plugin.dschf)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
    elif _sends_from_rank_0(accelerator):
        with loading_on_rank_0(accelerator.process_index):
            yield
    else:
        yield


def _sends_from_rank_0(accelerator: Any) -> bool:
    """Whether the backend's wrapper gives every rank the weights of rank 0: FSDP2 only where told to."""
    if accelerator.distributed_type is DistributedType.FSDP:
        return bool(accelerator.state.fsdp_plugin.cpu_ram_efficient_loading)
    return not _divides_while_loading(accelerator)


def _divides_while_loading(accelerator: Any) -> bool:
    """Whether transformers gives each rank its part of a model's tensors as it reads them."""
    is_deepspeed = accelerator.distributed_type is DistributedType.DEEPSPEED
    return is_deepspeed and bool(accelerator.state.deepspeed_plugin.zero3_init_flag)


@contextlib.contextmanager
def loading_on_rank_0(rank: int) -> Iterator[None]:
    """Inside, only rank 0 reads weights: on the others a model's tensors are on the meta device."""
    with contextlib.nullcontext() if rank == 0 else without_weights():
        yield


@torch.no_grad()
def fill_other_ranks(model: PreTrainedModel, accelerator: Any) -> None:
    """Give the ranks that read no weights what the backend's wrapper expects: rank 0's buffers, and
    parameters with addresses of their own, by which accelerate tells them apart for the optimizer. Their
    pages are not written until the wrapper has rank 0's weights.
    """
    if accelerator.num_processes == 1 or not _sends_from_rank_0(accelerator):
        return
    is_empty = accelerator.process_index > 0
    if is_empty:
        model.to_empty(device="cpu").tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                sent = torch.empty_like(buffer, device=accelerator.device) if is_empty else buffer
                received: Any = broadcast(sent.to(accelerator.device))
                module._buffers[name] = received.to("cpu")


def agree(value: Any) -> Any:
    """Rank 0's ``value`` on every rank, for use before a learner exists."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value


def this_process(deadline: Deadline = no_deadline) -> Process:
    """This process among the ranks that ``connect`` has joined. deadline: wraps every wait for the others."""
    state: Any = PartialState()

    def gather(objects: list[Any]) -> list[Any]:
        if state.num_processes == 1:
            return list(objects)
        with deadline("the other ranks", "to hand over their objects"):
            return gather_object(list(objects))

    def meet() -> None:
        with deadline("the other ranks", "to come here"):
            meet_ranks(state.num_processes)

    return Process(
        rank=state.process_index,
        world_size=state.num_processes,
        device=state.device,
        gather=gather,
        meet=meet if state.num_processes > 1 else no_meeting,
        deadline=deadline,
        is_main=state.process_index == 0,
    )


def background_group() -> Any:
    """A process group of all ranks for CPU tensors, for a thread of its own; None for one process.

    Whoever waits for that thread has a deadline; the thread has a day.
    """
    if PartialState().num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))


_MEETINGS = itertools.count()


def meet_ranks(ranks: int) -> None:
    """Returns once as many ranks have called it as often: outside of any collective, whose time limit knows
    nothing of a rank that still advances.
    """
    store = _connect_store()
    key = f"rltrain/meeting/{next(_MEETINGS)}"
    store.add(key, 1)
    pause = 0.005
    while store.add(key, 0) < ranks:
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


def _connect_store() -> TCPStore:
    """A connection of its own to the store through which the ranks met."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=10),
    )


class StoreBoard:
    """Implements ``rltrain.watchdog.Heartbeat`` on the store through which the ranks met, over a separate
    connection.
    """

    def __init__(self) -> None:
        state = PartialState()
        self._rank = state.process_index
        self.peers: Collection[int] = [rank for rank in range(state.num_processes) if rank != self._rank]
        self._store = _connect_store()

    def say(self, text: str) -> None:
        self._store.set(f"rltrain/{self._rank}", text)

    def read(self) -> Mapping[int, str]:
        present = [rank for rank in self.peers if self._store.check([f"rltrain/{rank}"])]
        return {rank: self._store.get(f"rltrain/{rank}").decode("utf-8") for rank in present}


def open_heartbeat_board() -> StoreBoard | None:
    """The board of the ranks; None for a process that runs alone."""
    return StoreBoard() if started_ranks() > 1 else None


def _disable_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling an all-reduce for CPUs.

    That takes 80 s, and a process killed meanwhile leaves a lock on which the next start hangs.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def backend_name(accelerator: Accelerator) -> str:
    """What divides the model among ranks, as ``rltrain plan --backend`` calls it; "ddp" for one process."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    return "fsdp2" if accelerator.distributed_type is DistributedType.FSDP else "ddp"
