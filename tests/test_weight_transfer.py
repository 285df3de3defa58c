"""The members of a weight transfer: an error of one ends the wait of all, long before any deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.sync.transport import start_call
from rltrain.weight_transfer import Membership, TransferGroup, connect_store, open_store

SECONDS = 60.0  # that no machine is too slow for
Join = Callable[..., Future[TransferGroup]]


@pytest.fixture
def join() -> Iterator[Join]:
    """Joins a group of so many members as one of them, in a thread."""
    store = open_store("127.0.0.1")

    def start(rank: int, size: int = 2, check: Callable[[], object] = lambda: None) -> Future[TransferGroup]:
        membership = Membership("127.0.0.1", store.port, "group", 1, size, "gloo", SECONDS)
        return start_call(TransferGroup, connect_store(membership), membership, rank, check)

    begun = time.monotonic()
    yield start
    assert time.monotonic() - begun < SECONDS


def refuse() -> None:
    raise OSError("the other side answered with an error")


def send(group: TransferGroup, check: Callable[[], object] = lambda: None) -> Tensor:
    buffer = torch.full((64,), 7, dtype=torch.uint8)
    group.broadcast(buffer, SECONDS, check)
    return buffer


def receive(group: TransferGroup) -> Tensor:
    buffer = torch.zeros(64, dtype=torch.uint8)
    group.broadcast(buffer, SECONDS)
    return buffer


def test_buckets_arrive_and_leave_nothing_in_the_store(join: Join) -> None:
    joining = [join(0), join(1)]
    sender, receiver = (each.result(SECONDS) for each in joining)
    for _ in range(3):
        arrived = start_call(receive, receiver)
        assert torch.equal(send(sender), arrived.result(SECONDS))
    assert not sender.store.check(["meeting/3/0"]) and sender.store.check(["meeting/4/0"])


def test_what_is_published_is_there_before_anybody_is_told(join: Join) -> None:
    """Of 20,000 sets without an answer 25 were not there yet when the news of them came over another way."""

    class Lazy:
        """Takes what is set when the next question on the connection is answered, as a server may."""

        def __init__(self, store: Any) -> None:
            self._store = store
            self._waiting: list[tuple[str, str]] = []

        def set(self, key: str, text: str) -> None:
            self._waiting.append((key, text))

        def check(self, keys: list[str]) -> bool:
            for key, text in self._waiting:
                self._store.set(key, text)
            self._waiting.clear()
            return self._store.check(keys)

    joining = [join(0), join(1)]
    asking = joining[0].result(SECONDS)
    publishing: Any = joining[1].result(SECONDS)
    publishing.store = Lazy(publishing.store)
    publishing.publish("proof", "sums")
    assert asking.store.check(["proof/1"]) and asking.store.get("proof/1") == b"sums"


def test_an_error_while_members_join_ends_the_wait_of_the_others(join: Join) -> None:
    waiting = join(1, size=3)
    with pytest.raises(OSError, match="answered with an error"):
        join(0, 3, refuse).result(SECONDS)
    with pytest.raises(RuntimeError, match="given up"):
        waiting.result(SECONDS)


def test_an_error_before_a_broadcast_ends_the_wait_of_the_others(join: Join) -> None:
    joining = [join(rank, size=3) for rank in range(3)]
    sender, receiver, _ = (each.result(SECONDS) for each in joining)
    waiting = start_call(receive, receiver)
    with pytest.raises(OSError, match="answered with an error"):
        send(sender, refuse)
    with pytest.raises(RuntimeError, match="given up"):
        waiting.result(SECONDS)


def test_the_end_of_one_member_ends_the_wait_of_the_others(join: Join) -> None:
    joining = [join(0), join(1)]
    sender, receiver = (each.result(SECONDS) for each in joining)
    waiting = start_call(receive, receiver)
    sender.abort()
    sender.abort()
    with pytest.raises(RuntimeError, match="given up"):
        waiting.result(SECONDS)
    with pytest.raises(RuntimeError, match="given up"):
        send(sender)
