"""What a push to a pool says that it sent: every weight as it was on the wire, whatever became of workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.sync import pool, transport
from rltrain.sync.pool import PoolPush
from rltrain.sync.server import WorkerLink
from rltrain.sync.transport import Pace
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from support.fake_worker import FakeWorker

TIES = {"head": "embedding"}
CAPACITY = 4096  # bytes: most buckets hold several weights, and layers.1.big travels alone
PACE = Pace(seconds=60.0, alive_seconds=60.0)  # that no machine is too slow for


def make_weights(*, is_tied: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (50, 16), "layers.0.a": (24, 16), "layers.0.b": (7,), "layers.1.big": (200, 30)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    head = weights["embedding"]
    return weights | {"norm": torch.ones(16), "head": head if is_tied else head + 1e-6}


def make_push() -> PoolPush:
    def link(name: str, control: Any) -> WorkerLink:
        cpu = torch.device("cpu")
        return WorkerLink(name, control, torch.float32, TIES, CAPACITY, cpu, pace=PACE)

    return PoolPush(link, torch.float32, TIES, lambda value: value)


def fingerprints_of(weights: dict[str, Tensor]) -> dict[str, Fingerprint]:
    return {name: weight_fingerprint(name, weight) for name, weight in weights.items()}


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    with_ties = FakeWorker(ties=TIES)
    yield with_ties
    with_ties.close()


def test_what_was_sent_is_known_without_a_worker() -> None:
    push = make_push()
    weights = make_weights()
    assert push.push({}, weights.items(), 0) == ((), {}, {})
    assert push.read({})[0] == fingerprints_of(weights)


@pytest.mark.parametrize("phase", ["", "bucket"])
def test_what_was_sent_is_known_of_every_weight(phase: str, worker: FakeWorker) -> None:
    """Also where the only worker dies in the middle of the buckets."""
    push = make_push()
    weights = make_weights()
    if phase:
        worker.order("die", phase)
    served, lost, quarantined = push.push({"a": worker.connect()}, weights.items(), 0)
    assert (served == ("a",), set(lost), quarantined) == (not phase, {"a"} if phase else set(), {})
    sent, errors = push.read({})
    assert sent == fingerprints_of(weights) and not errors
    push.close()


def test_a_head_of_the_learner_that_is_no_longer_tied_is_noticed(worker: FakeWorker) -> None:
    """The worker has the embedding under both names, and the learner computes with a head of its own."""
    push = make_push()
    weights = make_weights(is_tied=False)
    served, _, quarantined = push.push({"a": worker.connect()}, weights.items(), 0)
    assert not served and "'head'" in str(quarantined["a"])
    push.close()


def test_sums_are_taken_while_the_bucket_travels(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket leaves before the learner sums its weights, so that the worker does not wait for that."""
    events: list[str] = []
    start_call = transport.start_call

    def note_call(call: Any, *arguments: Any) -> Any:
        if arguments and isinstance(arguments[0], dict):
            events.extend(arguments[0].get("names", ()))
        return start_call(call, *arguments)

    def note_sum(name: str, weight: Tensor) -> Fingerprint:
        events.append(f"sum of {name}")
        return weight_fingerprint(name, weight)

    monkeypatch.setattr(pool, "weight_fingerprint", note_sum)
    monkeypatch.setattr(transport, "start_call", note_call)
    push = make_push()
    served = push.push({"a": worker.connect()}, make_weights().items(), 0)[0]
    push.close()
    assert served == ("a",)
    for name in make_weights().keys() - TIES.keys():
        assert events.index(name) < events.index(f"sum of {name}")
