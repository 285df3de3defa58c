"""The engine on a server that answers wrongly, is busy, stops or dies: no sample is lost silently, and a wait
ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.errors import TemporaryError
from rltrain.rollout.engines.checks import WeightShapes
from rltrain.rollout.engines.vllm_server import ServerModel, VllmServer
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.worker.answers import GarbageAnswer
from rltrain.rollout.worker.client import Seconds, WorkerClient, WorkerLost
from rltrain.rollout.worker.process import WorkerDied
from rltrain.tensor_ops import Fingerprint
from rltrain.types.samples import Prompt, RolloutGroup, Sampling
from support.fake_server import VOCABULARY
from support.fake_worker import FakeWorker, fake_worker

PROMPTS = [Prompt(str(number), (11, 12 + number), "") for number in range(3)]
SAMPLING = Sampling(n=4, temperature=1.0, max_tokens=12, seed=3)


class Pusher:
    """Implements ``WeightPusher`` for a server whose weights nobody looks at."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    def load(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert [name for name, _ in stream] == ["table"]
        self._worker.change(label=str(version))

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        return {}

    def close(self) -> None: ...


class DeadProcess:
    """A ``LocalWorker`` whose server was killed."""

    def require_alive(self) -> None:
        raise WorkerDied("the vLLM server ended, by SIGKILL")

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with fake_worker() as started:
        yield started


def open_engine(worker: FakeWorker, process: Any = None) -> VllmServer:
    client = WorkerClient(worker.url, worker.token, Seconds(call=5.0, generate=60.0, alive=0.2))
    names = {"table": (VOCABULARY, VOCABULARY)}
    model = ServerModel(WeightShapes(names, frozenset(names)), VOCABULARY, (1,), str, 256)
    engine = VllmServer(client, client.read_info(), model, Pusher(worker), worker=process)
    engine.load(iter([("table", torch.zeros(VOCABULARY, VOCABULARY))]), 1)
    return engine


@pytest.fixture
def engine(worker: FakeWorker) -> Iterator[VllmServer]:
    worker.set_fault(None)
    opened = open_engine(worker)
    yield opened
    worker.set_fault(None)
    opened.close()


def sample(engine: VllmServer) -> list[RolloutGroup]:
    return sample_groups(engine, PROMPTS, SAMPLING, 1)


@pytest.mark.parametrize("fault", ["choice twice", "nan", "other version"])
def test_what_was_answered_wrongly_is_asked_for_again(
    engine: VllmServer, worker: FakeWorker, fault: str
) -> None:
    expected = sample(engine)
    worker.set_fault(fault, 2)
    with pytest.warns(UserWarning, match="is sampled again"):
        assert sample(engine) == expected


def test_a_server_that_always_answers_wrongly_is_not_believed(engine: VllmServer, worker: FakeWorker) -> None:
    worker.set_fault("choice missing")
    message = r"refused 3 times, last because .*its choices have the numbers \[0, 1, 2\].*restart it"
    with (
        pytest.warns(UserWarning, match="is sampled again"),
        pytest.raises(GarbageAnswer, match=message),
    ):
        sample(engine)


def test_a_busy_server_is_waited_for(engine: VllmServer, worker: FakeWorker) -> None:
    expected = sample(engine)
    worker.set_fault("503", 3)
    assert sample(engine) == expected


def test_a_server_that_stops_is_lost_though_it_answers_health(engine: VllmServer, worker: FakeWorker) -> None:
    expected = sample(engine)
    worker.set_fault("hang")
    worker.change(is_stopped=True)
    try:
        with pytest.raises(WorkerLost, match=r"2 times in a row: it has died or hangs") as error:
            sample(engine)
        assert isinstance(error.value, TemporaryError)  # the process ends with exit code 75
    finally:
        worker.change(is_stopped=False)
    worker.set_fault(None)
    assert sample(engine) == expected


def test_a_server_of_this_run_that_was_killed_is_lost(worker: FakeWorker) -> None:
    worker.set_fault("hang")
    engine = open_engine(worker, DeadProcess())
    with pytest.raises(WorkerLost, match="by SIGKILL"):
        sample(engine)
    worker.set_fault(None)
    engine.close()


def test_no_two_ranks_number_a_request_alike(engine: VllmServer, worker: FakeWorker) -> None:
    """The server tells requests apart by their ids: one that is given up must not end another's."""
    before = len(worker.read("ids"))
    other = open_engine(worker)
    assert sample(other) == sample(engine)
    other.close()
    ids = worker.read("ids")[before:]
    assert len(ids) == len(set(ids)) == 2 * len(PROMPTS)
