"""rltrain's part inside the processes of a vLLM server: takes weights from the learner, and proves them.

vLLM loads this module for ``--worker-extension-cls``; its import registers the transfer engine "rltrain".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rltrain.errors import UserError
from rltrain.remote_code import trusts
from rltrain.rollout.engines.vllm.adapter import adapter_fingerprints
from rltrain.rollout.engines.vllm.colocated import read_architecture
from rltrain.rollout.engines.vllm.layers import (
    Architecture,
    Place,
    Reader,
    find_places,
    find_readers,
    read_products,
    record_packed_layers,
)
from rltrain.rollout.engines.vllm.packing import pack_experts_on_reload, repack_heads
from rltrain.rollout.engines.vllm.shares import SHARED_COPY, Product
from rltrain.seeds import stable_hash
from rltrain.tensor_ops import product_sums
from rltrain.weight_transfer import (
    Bucket,
    Membership,
    ProcessSums,
    TransferGroup,
    allocate_buffer,
    connect_store,
)

__all__ = ["Extension", "TransferEngine"]

_NAME = "rltrain"
_ENTRIES_SHARE = 32  # one packed layer of so many is read entry by entry at every proof, others as recorded


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The fields of ``Membership``."""

    host: str
    port: int
    prefix: str
    rank_offset: int
    world_size: int
    backend: str
    seconds: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The fields of ``Bucket``."""

    push: str
    index: int
    is_last: bool
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    seconds: float
    proof: str


class TransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes buckets by broadcast and loads each into the model as it comes."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: TransferGroup | None = None
        self._buffer: Tensor | None = None
        self._is_loading = False
        self._push = ""
        self._next = 0
        self._proof = ""
        self._is_complete = False
        self._places: tuple[Mapping[str, Place], Architecture] | None = None
        self._readers: Sequence[tuple[str, Reader]] = ()  # of every parameter
        if device.type == "cpu":
            pack_experts_on_reload(model)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        membership = Membership(**vars(init_info))
        parallel = self.parallel_config
        processes = parallel.data_parallel_index * parallel.world_size
        rank = membership.rank_offset + processes + parallel.rank
        self._group = TransferGroup(connect_store(membership), membership, rank)

    def start_weight_update(self) -> None:
        """Begins a push; what an unfinished one left in the layers is dropped."""
        self.abandon()
        initialize_layerwise_reload(self.model)
        self._is_loading = True
        self._push = ""
        self._next = 0
        self._is_complete = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # a CPU has nothing to wait for, and torch refuses to
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        bucket = Bucket(**vars(update_info))
        if self._group is None:
            raise RuntimeError("a bucket came before init_weight_transfer_engine, or after a broken transfer")
        if bucket.index != self._next or (self._next and bucket.push != self._push) or self._is_complete:
            raise RuntimeError(
                f"bucket {bucket.index} of push {bucket.push!r} came where bucket {self._next} of push "
                f"{self._push or 'any'!r} was expected; push all weights again"
            )
        size = bucket.total_bytes
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            self._buffer = allocate_buffer(size, self.device)
        if size:
            buffer = self._buffer[:size]
            self._group.broadcast(buffer, bucket.seconds)
            # The layers keep pieces until all of a layer have come, longer than the buffer keeps them.
            self._load((name, tensor.clone()) for name, tensor in bucket.views(buffer))
        self._push = bucket.push
        self._proof = bucket.proof
        self._next += 1
        self._is_complete = bucket.is_last

    def _load(self, weights: Any) -> None:
        model: Any = self.model
        model.load_weights(weights)

    def finish_weight_update(self) -> None:
        if not self._is_complete:
            raise RuntimeError(f"the push ended after {self._next} buckets, without its last")
        self.abandon()
        repack_heads(self.model)
        if self._proof:
            self.write_sums(self._proof)

    def abandon(self) -> None:
        """Gives every layer memory again after the buckets that came, whatever they were."""
        if self._is_loading:
            self._is_loading = False
            finalize_layerwise_reload(self.model, self.model_config)

    def write_sums(self, key: str, names: Collection[str] | None = None) -> None:
        """Writes the ``ProcessSums`` of the weights that this process computes with to the learner's store.

        names: of these alone; None: of all. The first proof reads every entry of packed layers; later ones
        those of a share that ``key`` draws, and of the others what was recorded when they were packed.

        By the store, because a server answers with its first engine's results alone. A model that cannot be
        proved says why there too: of an exception vLLM tells the learner no more than that there was one.
        """
        try:
            places, architecture = self.find_places()
            readers = self._readers
            if names is not None:
                readers = find_readers(self.model, places, architecture, names)

            def reads_entries(path: str) -> bool:
                return stable_hash(key, path) % _ENTRIES_SHARE == 0

            products = list(read_products(self.model, readers, reads_entries))
            sums = sum_products(products, self.parallel_config)
        except UserError as error:
            sums = ProcessSums(refusal=str(error))
        self.put(key, sums)

    def put(self, key: str, sums: ProcessSums) -> None:
        """Writes to the store of the learner, under a key of this process."""
        if self._group is None:
            raise RuntimeError("the learner asks for a proof, but has not sent init_weight_transfer_engine")
        self._group.publish(key, sums.to_json())

    def find_places(self) -> tuple[Mapping[str, Place], Architecture]:
        if self._places is None:
            config = self.vllm_config.model_config
            trusted = trusts(config.model, config.revision)
            architecture, _ = read_architecture(config.hf_config, trusted=trusted)
            places = find_places(self.model, architecture).by_name
            record_packed_layers(self.model, places, architecture)
            self._readers = find_readers(self.model, places, architecture)
            self._places = places, architecture
        return self._places

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


class Extension:
    """Methods that vLLM adds to its worker, for ``/collective_rpc``."""

    weight_transfer_engine: TransferEngine
    vllm_config: Any
    _weight_update_active: bool

    def rltrain_alive(self) -> str:
        """Answers while the process runs; ``/health`` answers for one that is stopped too."""
        return "alive"

    def rltrain_abandon(self) -> str:
        """Forgets a push that failed in some processes, so that the next may start in all."""
        self.weight_transfer_engine.abandon()
        self.weight_transfer_engine.reset_weight_update_target()
        self._weight_update_active = False
        return "abandoned"

    def rltrain_fingerprint(self, key: str, names: str = "") -> str:
        """``TransferEngine.write_sums``. names: a JSON list; empty: of all weights."""
        self.weight_transfer_engine.write_sums(key, set(json.loads(names)) if names else None)
        return "written"

    def rltrain_adapter_fingerprint(self, key: str, identity: str, rank: str) -> str:
        """The same of the adapter of this number, by peft's names: of A, and of B times the scale."""
        engine = self.vllm_config.parallel_config.data_parallel_index
        places, _ = self.weight_transfer_engine.find_places()
        held = adapter_fingerprints(self, int(identity), int(rank), places)
        sums = {name: (value.projection, value.square, engine) for name, value in held.items()}
        self.weight_transfer_engine.put(key, ProcessSums(sums))
        return "written"


@torch.inference_mode()
def sum_products(products: Sequence[Product], parallel: Any) -> ProcessSums:
    """Sums over the tensor-parallel processes where each has some columns, so that all of them call it.

    parallel: vLLM's ParallelConfig.
    """
    divided = [product for product in products if product.share.columns is not None]
    parts = {product.name: float(product_sums(product.name, product.values)[0]) for product in divided}
    undivided = [product for product in products if product.share.columns is None]
    products = [*undivided, *_add_columns(divided)]
    rank = get_tp_group().rank_in_group
    sums: dict[str, tuple[float, float, int]] = {}
    for product in products:
        share = product.share
        if share.columns is not None and rank > 0:
            continue  # the sum over all processes is the same in each
        rows = slice(None) if share.rows is None else share.rows.to(product.values.device)
        projection, norm = product_sums(product.name, product.values, rows=rows, count=share.count).tolist()
        engine = parallel.data_parallel_index * parallel.tensor_parallel_size
        # A weight that is whole in every process is a copy in each.
        local = share.copy if share.is_split else rank
        copy = SHARED_COPY if share.copy == SHARED_COPY else engine + local
        sums[product.name] = projection, norm * norm, copy
    return ProcessSums(sums, parts)


def _add_columns(products: Sequence[Product]) -> list[Product]:
    """Adds the products of column shares over the tensor-parallel processes."""
    if not products:
        return []
    together = torch.cat([product.values.cpu() for product in products])
    dist.all_reduce(together, group=get_tp_group().cpu_group)
    parts = together.split([product.values.numel() for product in products])
    return [
        replace(product, values=part.to(product.values.device))
        for product, part in zip(products, parts, strict=True)
    ]


if _NAME not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(_NAME, TransferEngine)
