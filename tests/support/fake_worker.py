"""A worker without vLLM: a process with the real routes, the real guard and the real transport, which errs as
it is told. The suite of the client runs on it as on a real server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import uvicorn
from torch import Tensor

from rltrain.rollout.worker.client import Seconds, WorkerClient
from rltrain.rollout.worker.guard import ADAPTER_FOLDER, TOKEN
from support.fake_server import FakeApp, FakeEngine
from support.warm import warm_context

# phase of a push -> the call at which a fault strikes; of the buckets, at the second
PHASES = {
    "pause": "/pause",
    "join": "/init_weight_transfer_engine",
    "start": "/start_weight_update",
    "bucket": "/update_weights",
    "finish": "/finish_weight_update",
    "resume": "/resume",
}
READ = "rltrain_fingerprint"  # the call by which weights are read again after a push
SECRET = "fake-worker-token-0123456789"
START_SECONDS = 60.0


class FakeWorker:
    """The worker, which serves when this returns. options: of its ``FakeEngine``.

    guarded: whether rltrain's guard stands before its routes. Raises RuntimeError where it does not start.
    """

    token = SECRET

    def __init__(self, *, guarded: bool = True, ties: Mapping[str, str] = {}, **options: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fw-"))  # short: a socket's path has at most 107 bytes
        self.url = f"unix:{self._folder / 's'}"
        context = warm_context()
        self._pipe, end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(end, self._folder, guarded, dict(ties), options), daemon=True
        )
        self._process.start()
        end.close()
        try:
            is_serving = self._pipe.poll(START_SECONDS) and self._pipe.recv() == "serving"
        except EOFError:
            is_serving = False
        if not is_serving:
            self.close()
            raise RuntimeError("the fake worker did not start")

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def connect(self, seconds: Seconds | None = None) -> RecordingClient:
        return RecordingClient(self.url, self.token, seconds or Seconds())

    def change(self, **changes: Any) -> None:
        """Sets attributes of the engine, or those of its ``FakeWeights``."""
        self._ask(changes)

    def set_fault(self, fault: str | None, count: int = 10**9) -> None:
        """From now on, in completions; ``count`` answers are spoilt."""
        self.change(fault=fault, fault_count=count)

    def order(self, strike: str, phase: str, times: int = 1) -> None:
        """Of ``PHASES``, or ``READ``; see ``FakeEngine``."""
        self.change(route=PHASES.get(phase, phase), strike=strike, strikes=times)

    def read(self, name: str) -> Any:
        """An attribute of the engine."""
        return self._ask(name)

    def weights(self) -> dict[str, Tensor]:
        """In float32."""
        return {name: torch.from_numpy(array) for name, array in self._ask("weights").items()}

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)  # a second call finds none

    def _ask(self, question: Any) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()


class RecordingClient(WorkerClient):
    """Keeps the paths and the extension's methods of the calls that block, in their order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calls: list[str] = []

    def _send(self, method: str, path: str, seconds: float, **content: Any) -> Any:
        body = content.get("json") or {}
        self.calls.append(body.get("method", path))
        return super()._send(method, path, seconds, **content)


@contextlib.contextmanager
def fake_worker(**options: Any) -> Iterator[FakeWorker]:
    """See ``FakeWorker``."""
    worker = FakeWorker(**options)
    try:
        yield worker
    finally:
        worker.close()


def _serve(
    pipe: Connection, folder: Path, guarded: bool, ties: dict[str, str], options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {TOKEN: SECRET, ADAPTER_FOLDER: str(folder / "adapters")}

    async def serve() -> None:
        engine = FakeEngine(**options)
        engine.weights.ties = ties
        app = FakeApp(engine, guarded=guarded)
        config = uvicorn.Config(
            app.serve, uds=str(folder / "s"), log_level="critical", interface="asgi3", lifespan="off"
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


def _obey(pipe: Connection, engine: FakeEngine) -> None:
    """Changes or reads the engine as the test says; ends with the test."""
    try:
        question = pipe.recv()
    except (EOFError, ConnectionResetError):
        os._exit(0)
    answer: Any = None
    if question == "weights":
        answer = {name: weight.float().numpy() for name, weight in engine.weights.tensors.items()}
    elif isinstance(question, str):
        answer = getattr(engine, question)
    else:
        for name, value in question.items():
            owner: Any = engine.weights if name in ("damaged", "refusal") else engine
            setattr(owner, name, value)
    pipe.send(answer)
