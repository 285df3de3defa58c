"""Pushes to workers over real gloo groups: every fault at every phase ends with the weights proved, or with a
worker that is lost and never resumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.sync.server import PushReport, ServerSync, WorkerLink, combine_copies
from rltrain.sync.transport import Pace
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.weight_transfer import ProcessSums
from support.fake_worker import PHASES, READ, FakeWorker

TIES = {"head": "embedding"}
CPU = torch.device("cpu")
SECONDS = 60.0  # that no machine is too slow for
PACE = Pace(seconds=SECONDS, alive_seconds=SECONDS)
SHORT = Pace(seconds=1.0, bytes_per_second=1e9, alive_seconds=0.5)  # of a worker that will not answer


def make_weights(version: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(version)
    shapes = {"embedding": (50, 16), "layers.0.a": (24, 16), "layers.0.b": (7,), "layers.1.a": (24, 16)}
    shapes |= {"layers.1.big": (200, 30), "norm": (16,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"head": weights["embedding"]}


def link_to(worker: FakeWorker, name: str = "worker 0", dtype: torch.dtype = torch.float32) -> WorkerLink:
    return WorkerLink(name, worker.connect(), dtype, TIES, capacity=4096, device=CPU, pace=PACE)


def calls(link: WorkerLink) -> list[str]:
    """Of the worker's server."""
    control: Any = link.control
    return control.calls


def push(links: list[WorkerLink], version: int, dtype: torch.dtype = torch.float32) -> PushReport:
    weights = make_weights(version)

    def fingerprints(dtype: torch.dtype) -> Mapping[str, Fingerprint]:
        return {name: weight_fingerprint(name, weight.to(dtype)) for name, weight in weights.items()}

    sync = ServerSync(links, dtype, lambda value: value, fingerprints)
    return sync.push(lambda dtype: iter(weights.items()), version)


def assert_holds(worker: FakeWorker, version: int) -> None:
    held = worker.weights()
    weights = make_weights(version)
    assert held.keys() == weights.keys() - TIES.keys()
    assert all(torch.equal(held[name], weights[name]) for name in held)


@pytest.fixture
def make_worker() -> Iterator[Callable[[], FakeWorker]]:
    workers: list[FakeWorker] = []

    def make() -> FakeWorker:
        workers.append(FakeWorker(ties=TIES))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_pushes_arrive_and_are_proved(make_worker: Callable[[], FakeWorker]) -> None:
    workers = [make_worker(), make_worker()]
    links = [link_to(worker, f"worker {place}") for place, worker in enumerate(workers)]
    for version in (1, 2):
        report = push(links, version)
        assert report.served == ("worker 0", "worker 1") and not report.lost and not report.quarantined
        assert (report.checked, report.difference) == (7, 0.0)
        for worker in workers:
            assert_holds(worker, version)
    assert calls(links[0]).count(PHASES["join"]) == 1  # the group stays
    assert calls(links[0])[-1] == "/resume"


def test_weights_travel_in_the_wire_dtype(make_worker: Callable[[], FakeWorker]) -> None:
    worker = make_worker()
    report = push([link_to(worker, dtype=torch.bfloat16)], 3, torch.bfloat16)
    assert report.served == ("worker 0",)
    weights = make_weights(3)
    assert all(torch.equal(held, weights[name].bfloat16().float()) for name, held in worker.weights().items())


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", ["error", "slow", "die", "stop"])
def test_every_fault_at_every_phase(fault: str, phase: str, make_worker: Callable[[], FakeWorker]) -> None:
    """Only a worker that stops is waited for until a deadline; any other's fault is noticed by itself."""
    worker, healthy = make_worker(), make_worker()
    links = [link_to(worker), link_to(healthy, "worker 1")]
    assert len(push(links, 1).served) == 2
    if phase == "join":
        links[0].channel.fail(RuntimeError("a new group is needed"))
    if fault == "stop":
        links[0].pace = links[0].channel.pace = SHORT
    calls(links[0]).clear()
    worker.order(fault, phase)
    begun = time.monotonic()
    report = push(links, 2)
    assert time.monotonic() - begun < SECONDS
    assert "worker 1" in report.served
    assert_holds(healthy, 2)
    if fault == "slow" or (fault == "error" and phase != "pause"):
        assert report.served == ("worker 0", "worker 1") and not report.lost
        assert_holds(worker, 2)
    else:
        assert report.lost.keys() == {"worker 0"} and links[0].version is None
        assert isinstance(report.lost["worker 0"], TimeoutError) == (fault == "stop")
        assert calls(links[0]).count("/resume") == (phase == "resume")


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "pause"])
def test_a_worker_that_fails_twice_is_lost_and_not_resumed(
    phase: str, make_worker: Callable[[], FakeWorker]
) -> None:
    worker = make_worker()
    link = link_to(worker)
    worker.order("error", phase, times=2)
    report = push([link], 1)
    assert "refused by order" in str(report.lost["worker 0"])
    assert not report.served and link.version is None
    assert calls(link).count("/resume") == (2 if phase == "resume" else 0)
    assert push([link], 2).served == ("worker 0",)


def test_a_worker_that_keeps_an_old_weight_is_quarantined(make_worker: Callable[[], FakeWorker]) -> None:
    worker = make_worker()
    link = link_to(worker)
    push([link], 1)
    worker.change(damaged="layers.1.a")
    calls(link).clear()
    report = push([link], 2)
    assert not report.served and not report.lost
    assert "layers.1.a" in str(report.quarantined["worker 0"])
    assert "/resume" not in calls(link)


def test_a_push_that_brings_its_proof_is_not_asked_for_it_and_a_later_read_is(
    make_worker: Callable[[], FakeWorker],
) -> None:
    link = link_to(make_worker())
    for version in (1, 2):
        report = push([link], version)
        assert report.served == ("worker 0",) and (report.checked, report.difference) == (7, 0.0)
    assert READ not in calls(link)
    assert link.fingerprint()["norm"].number == weight_fingerprint("norm", make_weights(2)["norm"]).number
    assert calls(link).count(READ) == 1


def test_a_read_that_fails_says_so_and_the_next_one_is_right(make_worker: Callable[[], FakeWorker]) -> None:
    worker = make_worker()
    link = link_to(worker)
    link.load(iter(make_weights(1).items()), 1)
    worker.order("error", READ)
    with pytest.raises(RuntimeError, match="refused by order"):
        link.fingerprint()
    assert link.fingerprint().keys() == make_weights(1).keys()


def test_a_head_that_keeps_an_old_weight_is_named(make_worker: Callable[[], FakeWorker]) -> None:
    worker = make_worker()
    link = link_to(worker)
    push([link], 1)
    worker.change(damaged="embedding")
    assert "'embedding'" in str(push([link], 2).quarantined["worker 0"])


def test_a_model_that_cannot_be_read_back_says_why(make_worker: Callable[[], FakeWorker]) -> None:
    worker = make_worker()
    worker.change(refusal="'query_key_value' is divided in a way that is not known; use tensor_parallel 1")
    link = link_to(worker)
    report = push([link], 1)
    assert not report.served and "/resume" not in calls(link)
    assert "worker 0: 'query_key_value'" in str(report.lost["worker 0"])


def test_copies_of_a_weight_that_differ_have_no_fingerprint(make_worker: Callable[[], FakeWorker]) -> None:
    link = link_to(make_worker())
    copies = [{"a": Fingerprint(1.0, 2.0), "b": Fingerprint(3.0, 4.0)}]
    copies.append({"a": Fingerprint(1.0, 2.0), "b": Fingerprint(3.1, 4.0)})
    link.read = lambda names=None: copies
    held = link.fingerprint()
    assert held["a"] == copies[0]["a"] and math.isnan(held["b"].number)
    with pytest.raises(WeightMismatchError, match="'b'"):
        compare(copies[0], held, 1e-12)


def test_a_worker_that_another_learner_left_in_a_push_takes_a_new_one(
    make_worker: Callable[[], FakeWorker],
) -> None:
    worker = make_worker()
    first = link_to(worker)
    first.begin()  # and then its learner dies
    assert push([link_to(worker)], 1).served == ("worker 0",)
    assert_holds(worker, 1)


def test_one_worker_alone_recovers_by_another_load(make_worker: Callable[[], FakeWorker]) -> None:
    worker = make_worker()
    link = link_to(worker)
    worker.order("error", "bucket")
    with pytest.raises(RuntimeError, match="refused by order"):
        link.load(iter(make_weights(1).items()), 1)
    assert "/resume" not in calls(link)
    link.load(iter(make_weights(1).items()), 1)
    assert_holds(worker, 1)
    held = link.fingerprint()
    assert held.keys() == make_weights(1).keys()
    assert held["head"].number == weight_fingerprint("head", make_weights(1)["head"]).number
    assert link.fingerprint({"head", "norm"}) == {name: held[name] for name in ("head", "norm")}


def test_parts_of_a_copy_add_up_and_every_copy_is_compared() -> None:
    first_process = {"norm": (1.0, 2.0, 0), "q": (1.0, 4.0, 0)}
    second_process = {"norm": (1.0, 2.5, 1), "q": (2.0, 5.0, 0)}
    first, second = combine_copies([first_process, second_process])
    assert first == {"norm": Fingerprint(1.0, 2.0), "q": Fingerprint(3.0, 9.0)}
    assert second == {"norm": Fingerprint(1.0, 2.5), "q": Fingerprint(3.0, 9.0)}


def test_a_process_that_kept_its_part_is_named(make_worker: Callable[[], FakeWorker]) -> None:
    link = link_to(make_worker())
    link._before = [ProcessSums({"q": (1.0, 4.0, 0)}), ProcessSums({"q": (2.0, 5.0, 0)})]
    held = [ProcessSums({"q": (7.0, 9.0, 0)}), ProcessSums({"q": (2.0, 5.0, 0)})]
    link._held = held
    with pytest.raises(WeightMismatchError, match="q in process 1"):
        link.prove({"q": Fingerprint(9.0, 15.0)}, combine_copies([each.sums for each in held]))
