"""Sends weights to workers in buckets, from the learner's rank 0.

Every rank iterates over the stream, because the gather of a weight is a collective; only rank 0 keeps what is
gathered, in one of two buffers. While a bucket travels, the next one is gathered.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from rltrain.sync.targets import WorkerControl
from rltrain.weight_transfer import (
    Bucket,
    Membership,
    TransferGroup,
    align_size,
    allocate_buffer,
    connect_store,
)

__all__ = ["WORKER_ERRORS", "Channel", "Pace", "Sender", "start_call", "wait_for"]

# What a worker's call, a transfer and their deadlines raise.
WORKER_ERRORS = (RuntimeError, OSError, ValueError)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Pace:
    """How long a transfer may take: seconds, and bytes a second beyond them."""

    seconds: float = 30.0
    bytes_per_second: float = 50e6
    alive_seconds: float = 5.0  # for a sign of life

    def deadline(self, size: int) -> float:
        """Seconds for ``size`` bytes."""
        return self.seconds + size / self.bytes_per_second


def start_call(call: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
    """Runs a call that blocks in a thread, which does not keep the process alive."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except WORKER_ERRORS as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(future: Future[_Result], seconds: float, what: str) -> _Result:
    """The call's result. Raises TimeoutError that names ``what``, and what the call raises."""
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.1f} s: {what}") from error


@dataclass
class Channel:
    """The way to one worker: its server's calls, and a process group that is built anew after an error."""

    name: str
    control: WorkerControl
    store: TCPStore
    host: str
    backend: str
    pace: Pace
    error: Exception | None = None
    group: TransferGroup | None = None
    members: int = 0  # the worker's processes
    _prefix: str = field(default_factory=secrets.token_hex)
    _generation: int = 0

    def join(self) -> None:
        """Builds the group of the learner and the worker's processes, unless there is one."""
        if self.group is not None:
            return
        self.members = self.call("say how many processes it has", self.control.world_size)
        self._generation += 1
        seconds = self.pace.seconds
        prefix = f"{self._prefix}/{self._generation}"
        membership = Membership(
            self.host, self.store.port, prefix, 1, self.members + 1, self.backend, seconds
        )
        answer = start_call(self.control.init_transfer, membership.to_json())
        group = start_call(_join_group, membership, answer)
        ends: list[Future[Any]] = [answer, group]
        wait(ends, 2 * seconds, FIRST_COMPLETED)
        _raise_early(answer)
        self.group = wait_for(group, 2 * seconds, "the worker's processes join the transfer")
        wait_for(answer, seconds, "the worker joins the transfer")

    def call(self, what: str, call: Callable[..., _Result], *arguments: Any, size: int = 0) -> _Result:
        """A call of the worker's server within the deadline of ``size`` bytes."""
        return wait_for(start_call(call, *arguments), self.pace.deadline(size), f"{self.name} has to {what}")

    def fail(self, error: Exception) -> None:
        """Keeps the first error and gives the group up."""
        self.error = self.error or error
        if self.group is not None:
            with contextlib.suppress(*WORKER_ERRORS):
                self.group.abort()
            self.group = None


def _join_group(membership: Membership, answer: Future[Any]) -> TransferGroup:
    """The learner's end, by a connection of its own to the store: nobody else can use one that waits."""
    return TransferGroup(connect_store(membership), membership, 0, lambda: _raise_early(answer))


def _raise_early(answer: Future[Any]) -> None:
    """Raises the error of a call that has ended with one."""
    if answer.done() and (error := answer.exception()) is not None:
        raise error


@dataclass
class _Flight:
    """A bucket on its way: per channel, the broadcast, unless it is empty, and the answer of the server."""

    bucket: Bucket
    buffer: Tensor
    works: list[tuple[Channel, Future[None] | None, Future[None]]]


@dataclass
class Sender:
    """Sends a stream of weights to ``channels``; without any, only iterates over it.

    dtype: of every weight that is a floating-point number, on the wire. capacity: bytes of each of the two
    buffers; a larger weight travels alone, from where it was gathered. skipped: names that are not sent,
    second names of tied weights. record: called with every weight, those that are not sent included, as it
    is on the wire: while its bucket travels, so that the workers do not wait for it. proof: see ``Bucket``.
    """

    channels: Sequence[Channel]
    dtype: torch.dtype
    capacity: int
    device: torch.device
    skipped: Collection[str] = ()
    record: Callable[[str, Tensor], None] | None = None
    proof: str = ""
    sent_bytes: int = 0
    _push: str = ""
    _buffers: list[Tensor] = field(default_factory=list)
    _flight: _Flight | None = None
    _index: int = 0

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """A channel that fails keeps its error, and the others go on.

        Where ``weights`` itself raises, every channel fails: its update has begun and cannot end.
        """
        try:
            self._send(weights)
        except BaseException as error:
            for channel in self._live():
                channel.fail(RuntimeError(f"the stream of weights ended early: {error}"))
            raise

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._push = secrets.token_hex(8)
        self._index = 0
        self.sent_bytes = 0
        if self.channels and not self._buffers:
            self._buffers = [allocate_buffer(self.capacity, self.device) for _ in range(2)]
        pending: dict[str, Tensor] = {}  # views of the buffer that is being filled
        used = 0
        for name, weight in weights:
            dtype = self.dtype if weight.is_floating_point() else weight.dtype
            if not self._live() or name in self.skipped:
                if self.record is not None:
                    self.record(name, weight.detach().to(dtype))
                del weight
                continue
            size = align_size(weight.numel() * dtype.itemsize)
            if used + size > self.capacity and pending:
                self._launch(pending, self._buffers[0][:used], is_last=False)
                pending = {}
                used = 0
            if size > self.capacity:
                self._send_alone(name, weight.detach().to(dtype).contiguous())
                del weight
                continue
            part = self._buffers[0][used : used + weight.numel() * dtype.itemsize]
            pending[name] = part.view(dtype).view(weight.shape).copy_(weight.detach())
            used += size
            del weight
        if pending or self._live():
            self._launch(pending, self._buffers[0][:used], is_last=True)
            self._land()

    def _live(self) -> list[Channel]:
        return [channel for channel in self.channels if channel.error is None]

    def _send_alone(self, name: str, weight: Tensor) -> None:
        """Sends a weight that is larger than a buffer; it is gone before the next one is gathered."""
        buffer = weight.flatten().view(torch.uint8)
        if gap := align_size(buffer.numel()) - buffer.numel():
            buffer = torch.nn.functional.pad(buffer, (0, gap))
        self._land()
        self._start({name: weight}, buffer, is_last=False)
        self._land()

    def _launch(self, tensors: Mapping[str, Tensor], buffer: Tensor, *, is_last: bool) -> None:
        """Sends the buffer that is full, once the one before has landed, and turns to the other."""
        self._land()
        self._start(tensors, buffer, is_last=is_last)
        self._buffers.reverse()

    def _start(self, tensors: Mapping[str, Tensor], buffer: Tensor, *, is_last: bool) -> None:
        bucket = Bucket(
            self._push,
            self._index,
            is_last,
            list(tensors),
            [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            [list(tensor.shape) for tensor in tensors.values()],
            0.0,
            self.proof,
        )
        self._index += 1
        self.sent_bytes += bucket.total_bytes
        works: list[tuple[Channel, Future[None] | None, Future[None]]] = []
        for channel in self._live():
            seconds = channel.pace.deadline(buffer.numel())
            answer = start_call(channel.control.update, {**bucket.to_json(), "seconds": seconds})
            assert channel.group is not None
            # A bucket without tensors only says that it is the last.
            transfer = None
            if tensors:
                check = functools.partial(_raise_early, answer)
                transfer = start_call(channel.group.broadcast, buffer, seconds, check)
            works.append((channel, transfer, answer))
        self._flight = _Flight(bucket, buffer, works)
        if self.record is not None:
            for name, tensor in tensors.items():
                self.record(name, tensor)

    def _land(self) -> None:
        """Waits until the bucket on its way has arrived everywhere; its buffer is free then."""
        if self._flight is None:
            return
        for channel, transfer, answer in self._flight.works:
            seconds = channel.pace.deadline(self._flight.buffer.numel())
            what = f"{channel.name} has to take bucket {self._flight.bucket.index}"
            try:
                if transfer is not None:
                    wait_for(transfer, 3 * seconds, what)  # its own deadline is twice as long
                wait_for(answer, seconds, what)
            except WORKER_ERRORS as error:
                channel.fail(error)
        self._flight = None
