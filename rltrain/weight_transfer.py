"""What the two ends of a weight transfer agree on: who is in the group, and how tensors lie in a bucket.

The learner is rank 0 of a process group of its own for each worker; the worker's processes are the ranks from
1 on. A bucket is one broadcast of bytes; its description travels beside it, through the worker's server. The
same code runs over gloo and NCCL.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from rltrain.errors import UserError

__all__ = [
    "Bucket",
    "Membership",
    "ProcessSums",
    "TransferGroup",
    "allocate_buffer",
    "connect_store",
    "open_store",
]

_ALIGNMENT = 16  # bytes; a view of any type may begin there
_POLL_SECONDS = 0.0005
_GIVEN_UP = "given up"
_CONNECT_SECONDS = 30.0


@dataclass(frozen=True)
class Membership:
    """How a process finds the group: ``init_info`` of vLLM's ``/init_weight_transfer_engine``.

    host, port: of the store that the learner serves. prefix: of this group's keys, which nobody else can
    guess. rank_offset: the group's rank of the worker's first process. seconds: for all to join.
    """

    host: str
    port: int
    prefix: str
    rank_offset: int
    world_size: int
    backend: str  # "gloo" or "nccl"
    seconds: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together: ``update_info`` of vLLM's ``/update_weights``.

    push, index: buckets of another push, or in another order, are refused. seconds: for the broadcast. proof:
    where the processes publish their ``ProcessSums`` when they finish the push; empty: nowhere.
    """

    push: str
    index: int
    is_last: bool
    names: Sequence[str]
    dtype_names: Sequence[str]
    shapes: Sequence[Sequence[int]]
    seconds: float
    proof: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [getattr(torch, name) for name in self.dtype_names]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor, with the gap behind it."""
        return [
            align_size(math.prod(shape) * dtype.itemsize)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)

    def views(self, buffer: Tensor) -> list[tuple[str, Tensor]]:
        """The tensors in ``buffer (bytes,)``, which they share."""
        parts = buffer[: self.total_bytes].split(self.sizes)
        rows = zip(self.names, parts, self.dtypes, self.shapes, strict=True)
        return [
            (name, part[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape)))
            for name, part, dtype, shape in rows
        ]


@dataclass(frozen=True)
class ProcessSums:
    """What a worker's process says of the weights that it computes with.

    sums: u.y, |y|^2 and the number of the copy that it holds a part of, by checkpoint name; the parts of a
    copy add up. parts: u.y of its own columns alone, of weights whose columns the processes divide; their sum
    is in the first one's ``sums``. refusal: why the model cannot be proved.
    """

    sums: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    refusal: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ProcessSums:
        return cls(**json.loads(text))

    def own(self, name: str) -> float | None:
        """A number of what this process alone holds of the weight."""
        if name in self.parts:
            return self.parts[name]
        return self.sums[name][0] if name in self.sums else None


def align_size(size: int) -> int:
    """``size`` bytes and the gap behind them."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def allocate_buffer(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def open_store(host: str) -> TCPStore:
    """A store that listens on the address of ``host`` alone, not on every one of the machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.bind(address)
        listener.listen()
        port = listener.getsockname()[1]
        return TCPStore(
            host,
            port,
            None,
            True,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def connect_store(membership: Membership) -> TCPStore:
    timeout = timedelta(seconds=membership.seconds)
    return TCPStore(membership.host, membership.port, None, False, timeout=timeout)


class TransferGroup:
    """A process's end of the group, made when every member has come. store: a connection that nobody else
    waits on. check: called while it waits; what it raises ends the wait, here and at the other members.

    Members meet before anything begins that gloo would not end before its own deadline: to join, and to
    broadcast. After an error or ``abort`` the group is of no use; another prefix makes a new one.
    """

    def __init__(
        self,
        store: Store,
        membership: Membership,
        rank: int,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self.store = PrefixStore(membership.prefix, store)
        self._rank = rank
        self._size = membership.world_size
        self._meetings = 0
        self._is_nccl = membership.backend == "nccl"
        build = _build_nccl if self._is_nccl else _build_gloo
        self._meet(membership.seconds, check)
        self._group: Any = build(self.store, membership, rank)

    def broadcast(self, buffer: Tensor, seconds: float, check: Callable[[], object] = lambda: None) -> None:
        """Sends rank 0's ``buffer`` to all, and returns when it has arrived.

        Raises TimeoutError after ``seconds`` without the other members, or as many of transfer, RuntimeError
        where a member is gone or has given up, and what ``check`` raises.
        """
        self._meet(seconds, check)
        group = self._group
        if group is None:
            raise RuntimeError("the weight transfer was given up")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        # NCCL's own timeout would end the process; the loop below ends the wait.
        options.timeout = timedelta(seconds=seconds * 10 if self._is_nccl else seconds)
        work = group.broadcast([buffer], options)
        until = time.monotonic() + seconds
        while not work.is_completed():
            check()
            if time.monotonic() > until:
                raise TimeoutError(f"the weight transfer took more than {seconds:.1f} s for one bucket")
            time.sleep(_POLL_SECONDS)
        work.wait()

    def publish(self, key: str, text: str) -> None:
        """Writes ``text`` under a key of this member; who is told of it afterwards finds it there.

        Nobody answers a store's ``set``: the server of the store may take it later than the news that it was
        sent. The answer to the next question on this connection comes after it.
        """
        entry = f"{key}/{self._rank}"
        self.store.set(entry, text)
        if not self.store.check([entry]):
            raise RuntimeError(f"the store of the weight transfer has lost {entry}")

    def _meet(self, seconds: float, check: Callable[[], object]) -> None:
        """Waits until every member has come as often as this one."""
        self._meetings += 1
        keys = [f"meeting/{self._meetings}/{member}" for member in range(self._size)]
        until = time.monotonic() + seconds
        try:
            self.store.set(keys[self._rank], "")
            while not self.store.check(keys):
                check()
                if self.store.check([_GIVEN_UP]):
                    raise RuntimeError("another member of the weight transfer has given up")
                if time.monotonic() > until:
                    count = sum(self.store.check([key]) for key in keys)
                    raise TimeoutError(
                        f"{count} of {self._size} members of the weight transfer have come within "
                        f"{seconds:.1f} s"
                    )
                time.sleep(_POLL_SECONDS)
        except BaseException:
            self._give_up()
            raise
        if self._rank == 0 and self._meetings > 1:  # all have left the meeting before
            for member in range(self._size):
                self.store.delete_key(f"meeting/{self._meetings - 1}/{member}")

    def abort(self) -> None:
        """Ends the group: nobody meets any more. A second call does nothing."""
        group, self._group = self._group, None
        if group is None:
            return
        self._give_up()
        group.abort()
        # A broadcast over gloo that has begun keeps the group's last owner waiting for its deadline. Without
        # the thread the caller would wait; as a daemon it would crash a process that ends meanwhile.
        owner = [group]
        del group
        threading.Thread(target=owner.clear, daemon=False).start()

    def _give_up(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone with its learner
            self.store.set(_GIVEN_UP, "")


def _build_gloo(store: Store, membership: Membership, rank: int) -> Any:
    group: Any = dist.ProcessGroupGloo
    options = group._Options()
    options._timeout = timedelta(seconds=membership.seconds)
    options._devices = [group.create_device(hostname=_own_address(membership), lazy_init=False)]
    return group(store, rank, membership.world_size, options)


def _build_nccl(store: Store, membership: Membership, rank: int) -> Any:
    group: Any = getattr(dist, "ProcessGroupNCCL", None)
    if group is None or not torch.cuda.is_available():
        raise UserError("weights cannot travel by nccl: no GPU, or a torch without it; use gloo")
    options = group.Options()
    options._timeout = timedelta(seconds=10 * membership.seconds)
    return group(store, rank, membership.world_size, options)


def _own_address(membership: Membership) -> str:
    """This machine's address on the way to the store."""
    with socket.create_connection((membership.host, membership.port), timeout=membership.seconds) as probe:
        return str(probe.getsockname()[0])
