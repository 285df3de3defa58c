"""A pool of fake workers, which can be killed, stopped, slowed down and made to answer wrongly."""

from __future__ import annotations

import io
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.rollout.engines.checks import WeightShapes
from rltrain.rollout.engines.vllm_pool import VllmPool
from rltrain.rollout.pool.pool import PoolRules, WorkerPool
from rltrain.rollout.pool.routed import RoutedPool
from rltrain.rollout.worker.client import Seconds, WorkerClient
from rltrain.rollout.worker.process import WorkerDied
from rltrain.rollout.worker.requests import ServerModel
from rltrain.rollout.worker.threads import LoopThread
from rltrain.sync.pool import PoolPush
from rltrain.sync.server import WorkerLink
from rltrain.sync.transport import Pace
from rltrain.types.samples import Completion, Prompt
from support.fake_server import LONGEST, ROWS, TABLE_SHAPES, VOCABULARY
from support.fake_worker import SECRET, START_SECONDS, FakeWorker
from support.patience import PATIENCE

__all__ = [
    "SECRET",
    "START_SECONDS",
    "FakeHome",
    "Ranks",
    "make_engine",
    "make_other_rank",
    "make_weights",
    "pickle_packed",
    "wait_until",
]

SHAPES = TABLE_SHAPES
MODEL = ServerModel(WeightShapes(SHAPES, SHAPES), VOCABULARY, (1,), lambda ids: "", LONGEST)


def make_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def pickle_packed(value: Any) -> bytes:
    """Asserts that no object in ``value`` has tokens as Python numbers."""
    file = io.BytesIO()
    _PackedPickler(file).dump(value)
    return file.getvalue()


class _PackedPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> None:
        """Called for every object; None: it is pickled as it is."""
        if isinstance(obj, Prompt | Completion):
            assert not obj.token_ids, f"{type(obj).__name__} crosses with its tokens one by one"


class FakeHome:
    """Implements ``Home``: opening starts a worker, or a new one in place of a dead or hanging one.

    options: of the engine, for every worker that it starts. starts: workers so far.
    """

    is_local = True

    def __init__(self, alive_seconds: float = 5.0, **options: Any) -> None:
        self.options = options
        self.alive_seconds = alive_seconds
        self.starts = 0
        self.is_closed = False
        self.refusal: str | None = None  # why no worker starts
        self._worker: FakeWorker | None = None

    @property
    def worker(self) -> FakeWorker:
        """The present one."""
        assert self._worker is not None
        return self._worker

    @property
    def socket(self) -> Path:
        """At which the present worker listens."""
        return Path(self.worker.url.removeprefix("unix:"))

    @property
    def pid(self) -> int:
        return self.worker.pid

    def open(self) -> tuple[WorkerClient, int]:
        if self.is_closed or self.refusal is not None:
            raise WorkerDied(self.refusal or "closed")
        self._end()
        self.starts += 1
        try:
            self._worker = FakeWorker(**self.options)
        except RuntimeError as error:
            raise WorkerDied(str(error)) from error
        if self.is_closed:  # while it started
            self._end()
            raise WorkerDied("closed")
        client = self._worker.connect(Seconds(alive=self.alive_seconds))
        client.read_info()
        client.require_alive()
        return client, ROWS

    def change(self, **changes: Any) -> None:
        """Sets attributes of the present worker's engine."""
        self.worker.change(**changes)

    def signal(self, number: signal.Signals) -> None:
        self.worker.signal(number)

    def require_process(self) -> None:
        if self._worker is not None and not self._worker.is_alive:
            raise WorkerDied("the fake worker's process has ended")

    def close(self) -> None:
        self.is_closed = True
        self._end()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()


def make_engine(
    homes: dict[str, Any], rules: PoolRules | None = None, say: Any = lambda line: None, **ranks: Any
) -> tuple[VllmPool, WorkerPool]:
    """An engine over these workers, all of which answer. ranks: where it is one of several."""
    push_seconds = ranks.pop("push_seconds", 5.0)
    router = ranks.pop("router", None)  # url of one in front of the workers
    rules = rules or PoolRules(VOCABULARY, patience=60.0, alive=1.0, poll=0.02, retry=0.05)
    loop = LoopThread()
    pool = WorkerPool(homes, rules, say)
    if router is not None:
        pool = RoutedPool(homes, rules, router, WorkerClient(router, SECRET), say)
    loop.run(pool.start()).result()
    loop.run(pool.wait_for_workers(START_SECONDS)).result()

    def link(name: str, control: Any) -> WorkerLink:
        pace = Pace(seconds=push_seconds, alive_seconds=push_seconds)
        return WorkerLink(name, control, torch.float32, {}, 4096, torch.device("cpu"), pace=pace)

    return VllmPool(pool, loop, MODEL, make_pusher(link, ranks), torch.float32, **ranks), pool


def make_other_rank(**ranks: Any) -> VllmPool:
    """The engine of a rank that only joins gathers."""
    return VllmPool(None, None, MODEL, make_pusher(None, ranks), torch.float32, **ranks)


def make_pusher(link: Any, ranks: dict[str, Any]) -> PoolPush:
    gather = ranks.get("gather", list)
    is_main = ranks.get("rank", 0) == 0
    return PoolPush(link, torch.float32, {}, lambda value: gather([value] if is_main else [])[0], is_main)


def wait_until(condition: Any, seconds: float = PATIENCE) -> float:
    """Seconds until ``condition()`` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "waited too long"
        time.sleep(0.005)
    return time.monotonic() - start


class Ranks:
    """The gathers of ranks that are threads of this process; each gets copies, as if it were a process.

    Fails where tokens cross as Python numbers, one by one.
    """

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60.0)
        self._parts = [b""] * count

    def gather(self, rank: int, part: list[Any]) -> list[Any]:
        self._parts[rank] = pickle_packed(part)
        self._barrier.wait()
        everything = [item for each in self._parts for item in pickle.loads(each)]
        self._barrier.wait()
        return everything
