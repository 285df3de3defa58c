"""Workers of a pool without vLLM: processes with the real routes, whose table of next-token log-probs comes
through the real transport. They can be killed, stopped, slowed down and made to answer wrongly.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import uvicorn
from torch import Tensor

from rltrain.rollout.engines.checks import WeightShapes
from rltrain.rollout.engines.vllm_pool import VllmPool
from rltrain.rollout.pool.pool import PoolRules, WorkerPool
from rltrain.rollout.pool.routed import RoutedPool
from rltrain.rollout.worker.client import Seconds, WorkerClient
from rltrain.rollout.worker.guard import TOKEN, BadRequest
from rltrain.rollout.worker.process import WorkerDied
from rltrain.rollout.worker.requests import ServerModel
from rltrain.rollout.worker.threads import LoopThread
from rltrain.sync.pool import PoolPush
from rltrain.sync.server import WorkerLink
from rltrain.sync.transport import Pace
from support.fake_server import LONGEST, ROWS, VOCABULARY, FakeApp, FakeEngine
from support.fake_worker import State

SECRET = "fake-pool-token-0123456789"
SHAPES = {"table": (VOCABULARY, VOCABULARY), "bias": (VOCABULARY,)}
START_SECONDS = 60.0
MODEL = ServerModel(WeightShapes(SHAPES, SHAPES), VOCABULARY, (1,), lambda ids: "", LONGEST)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "uvicorn", "support.fake_server", "rltrain.weight_transfer"])


def make_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@dataclass
class PoolEngine(FakeEngine):
    """die_after: tokens that it writes before its process is killed. route: the call at which ``strike``
    happens once: "die", "stop" or "error"; of weights, at the second bucket.
    """

    state: State = field(default_factory=lambda: State({}))
    die_after: int | None = None
    route: str | None = None
    strike: str = ""

    def meet(self, route: str) -> None:
        """Strikes where the test said so."""
        if route != self.route:
            return
        self.route = None
        if self.strike == "error":
            raise BadRequest(500, "planted")
        os.kill(os.getpid(), signal.SIGKILL if self.strike == "die" else signal.SIGSTOP)

    def count_token(self) -> None:
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, version: str) -> None:
        self.state.finish(version)
        weights = self.state.weights
        self.logits = (weights["table"] + weights["bias"]).double().numpy()
        self.label = version


class PoolApp(FakeApp):
    """The routes of a fake server, and those that move weights."""

    async def answer(self, path: str, query: dict[str, str], body: dict[str, Any]) -> Any:
        engine = self.engine
        assert isinstance(engine, PoolEngine)
        state = engine.state
        is_early = path == "/update_weights" and body["update_info"]["index"] == 0
        engine.meet("" if is_early else body.get("method", path))
        calls = {
            "/init_weight_transfer_engine": lambda: state.join(body["init_info"]),
            "/start_weight_update": state.start,
            "/update_weights": lambda: state.update(body["update_info"]),
            "/finish_weight_update": lambda: engine.finish(body["weight_version"]),
        }
        if path == "/collective_rpc" and body["method"] != "rltrain_alive":
            call = getattr(state, body["method"])
            return {"results": [await asyncio.to_thread(call, **body.get("kwargs", {}))]}
        if path not in calls:
            return await super().answer(path, query, body)
        await asyncio.to_thread(calls[path])
        return {}


def _serve(pipe: Connection, socket: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ[TOKEN] = SECRET

    async def serve() -> None:
        engine = PoolEngine(**options)
        app = PoolApp(engine, guarded=True)
        config = uvicorn.Config(
            app.serve, uds=socket, log_level="critical", interface="asgi3", lifespan="off"
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        pipe.send("serving")
        asyncio.get_running_loop().add_reader(pipe.fileno(), _obey, pipe, engine)
        await task

    asyncio.run(serve())


def _obey(pipe: Connection, engine: PoolEngine) -> None:
    """Changes the engine as the test says; ends with the test."""
    try:
        changes = pipe.recv()
    except (EOFError, ConnectionResetError):
        os._exit(0)
    for name, value in changes.items():
        setattr(engine, name, value)
    pipe.send("done")


class FakeHome:
    """Implements ``Home``: opening starts a process, or a new one in place of a dead or hanging one.

    options: of the engine, for every process that it starts. starts: processes so far.
    """

    is_local = True

    def __init__(self, alive_seconds: float = 5.0, **options: Any) -> None:
        self.options = options
        self.alive_seconds = alive_seconds
        self.starts = 0
        self.is_closed = False
        self.refusal: str | None = None  # why no worker starts
        self._folder = Path(tempfile.mkdtemp(prefix="fp-"))
        self._process: Any = None
        self._pipe: Connection | None = None

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def open(self) -> tuple[WorkerClient, int]:
        if self.is_closed or self.refusal is not None:
            raise WorkerDied(self.refusal or "closed")
        self._start()
        client = WorkerClient(f"unix:{self.socket}", SECRET, Seconds(alive=self.alive_seconds))
        client.read_info()
        client.require_alive()
        return client, ROWS

    def _start(self) -> None:
        self._end()
        self.starts += 1
        self.socket = self._folder / str(self.starts)
        self._pipe, end = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_serve, args=(end, str(self.socket), self.options), daemon=True
        )
        self._process.start()
        end.close()
        try:
            is_serving = self._pipe.poll(START_SECONDS) and self._pipe.recv() == "serving"
        except EOFError:
            is_serving = False
        if not is_serving:
            raise WorkerDied("the fake worker did not start")

    def change(self, **changes: Any) -> None:
        """Sets attributes of the present process's engine."""
        assert self._pipe is not None
        self._pipe.send(changes)
        assert self._pipe.recv() == "done"

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def require_process(self) -> None:
        if self._process is not None and not self._process.is_alive():
            raise WorkerDied("the fake worker's process has ended")

    def close(self) -> None:
        self.is_closed = True
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)  # a second call finds none

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


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
        pace = Pace(seconds=push_seconds, alive_seconds=2.0)
        return WorkerLink(name, control, torch.float32, {}, 4096, torch.device("cpu"), pace=pace)

    return VllmPool(pool, loop, MODEL, make_pusher(link, ranks), torch.float32, **ranks), pool


def make_other_rank(**ranks: Any) -> VllmPool:
    """The engine of a rank that only joins gathers."""
    return VllmPool(None, None, MODEL, make_pusher(None, ranks), torch.float32, **ranks)


def make_pusher(link: Any, ranks: dict[str, Any]) -> PoolPush:
    gather = ranks.get("gather", list)
    is_main = ranks.get("rank", 0) == 0
    return PoolPush(link, torch.float32, {}, lambda value: gather([value] if is_main else [])[0], is_main)


def wait_until(condition: Any, seconds: float = 120.0) -> float:
    """Seconds until ``condition()`` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited too long"
        time.sleep(0.005)
    return time.monotonic() - start


class Ranks:
    """The gathers of ranks that are threads of this process."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60.0)
        self._parts: list[list[Any]] = [[] for _ in range(count)]

    def gather(self, rank: int, part: list[Any]) -> list[Any]:
        self._parts[rank] = list(part)
        self._barrier.wait()
        everything = [item for each in self._parts for item in each]
        self._barrier.wait()
        return everything
