"""A worker without vLLM: the routes of vLLM 0.32 that the client calls, behind the real guard.

Its model is a table of next-token log-probs. ``FakeWorker.fault`` makes it answer wrongly; the client suite
runs on it and on a real server, so that what it says stays what vLLM says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import uvicorn

from rltrain.rollout.worker.guard import ADAPTER_FOLDER, TOKEN, BadRequest, Choice, Guard

VOCABULARY = 101
LONGEST = 256
ROWS = 32
STEP_SECONDS = 0.001  # of one token


@dataclass
class FakeEngine:
    """State of the server: the table of next-token log-probs (V, V), their label, and the fault."""

    label: str = "default"
    fault: str | None = None
    fault_count: int = 10**9  # answers that the fault spoils before the worker is sound again
    logits: Any = field(
        default_factory=lambda: np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY))
    )
    running: int = 0
    answered: int = 0
    aborted: bool = False
    is_stopped: bool = False  # the processes behind the server
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    seconds: float = STEP_SECONDS  # of one token

    def __post_init__(self) -> None:
        self.resumed.set()

    async def sample(self, request: dict[str, Any]) -> list[Choice]:
        require_sound(request)
        params = request["sampling_params"]
        self.running += params["n"]
        self.answered += 1
        try:
            rows = (self.sample_one(request["token_ids"][-1], params, index) for index in range(params["n"]))
            choices = list(await asyncio.gather(*rows))
        finally:
            self.running -= params["n"]
        if self.fault is None or self.fault_count <= 0:
            return choices
        self.fault_count -= 1
        return await FAULTS[self.fault](choices)

    async def pause(self, mode: str) -> None:
        """As vLLM 0.32: abort answers with what is there, wait finishes, keep freezes."""
        self.aborted = mode == "abort"
        while mode != "keep" and self.running:
            await asyncio.sleep(STEP_SECONDS)
        self.aborted = False
        self.resumed.clear()

    def count_token(self) -> None:
        """Called before each token; a subclass may end the process there."""

    async def sample_one(self, last: int, params: dict[str, Any], index: int) -> Choice:
        generator = np.random.default_rng(params["seed"] + index)
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = "length"
        while len(tokens) < params["max_tokens"]:
            await asyncio.sleep(self.seconds)
            self.count_token()
            if self.aborted and tokens:
                finish = "abort"
                break
            await self.resumed.wait()
            row = self.logits[last] / (params["temperature"] or 1.0)
            row = row - np.log(np.exp(row - row.max()).sum()) - row.max()
            greedy = params["temperature"] == 0
            last = int(row.argmax() if greedy else generator.choice(VOCABULARY, p=np.exp(row)))
            tokens.append(last)
            logprobs.append(float(np.float32(row[last])))
            if last in params["stop_token_ids"]:
                finish = "stop"
                break
        stop = last if finish == "stop" else None
        return Choice(index, tokens, logprobs, finish, stop, [(self.label, 0, len(tokens))])


def require_sound(request: dict[str, Any]) -> None:
    params = request["sampling_params"]
    tokens = request["token_ids"]
    if request["model"] != "policy":
        raise BadRequest(404, f"model {request['model']!r} is unknown")
    if not 1 <= params["n"] <= ROWS or (params["n"] > 1 and params["temperature"] == 0):
        raise BadRequest(400, f"n is {params['n']}")
    if not tokens or not all(0 <= token < VOCABULARY for token in tokens):
        raise BadRequest(400, "token_ids")
    if len(tokens) + params["max_tokens"] > LONGEST:
        raise BadRequest(400, "too long")


def change_first(**changes: Any) -> Callable[[list[Choice]], Any]:
    """A fault in the first choice. A change that is a function is given the choice's own value."""

    async def spoil(choices: list[Choice]) -> list[Choice]:
        first = choices[0]
        values = {
            name: change(getattr(first, name)) if callable(change) else change
            for name, change in changes.items()
        }
        return [replace(first, **values), *choices[1:]]

    return spoil


async def hang(choices: list[Choice]) -> list[Choice]:
    await asyncio.Event().wait()
    return choices


async def repeat_first(choices: list[Choice]) -> list[Choice]:
    return [choices[0], *choices]


async def drop_last(choices: list[Choice]) -> list[Choice]:
    return choices[:-1]


def answer_with(status: int) -> Callable[[list[Choice]], Any]:
    async def refuse(choices: list[Choice]) -> list[Choice]:
        raise BadRequest(status, "planted")

    return refuse


# what the worker does to the answer of a request for completions
FAULTS: dict[str, Callable[[list[Choice]], Any]] = {
    "hang": hang,
    "500": answer_with(500),
    "503": answer_with(503),
    "choice twice": repeat_first,
    "choice missing": drop_last,
    "other index": change_first(index=7),
    "no tokens": change_first(token_ids=[], logprobs=[], versions=[]),
    "log-prob missing": change_first(logprobs=lambda values: values[:-1]),
    "token outside": change_first(token_ids=lambda ids: [VOCABULARY, *ids[1:]]),
    "negative token": change_first(token_ids=lambda ids: [-1, *ids[1:]]),
    "nan": change_first(logprobs=lambda values: [float("nan"), *values[1:]]),
    "floor": change_first(logprobs=lambda values: [-9999.0, *values[1:]]),
    "minus infinity": change_first(logprobs=lambda values: [float("-inf"), *values[1:]]),
    "above zero": change_first(logprobs=lambda values: [0.5, *values[1:]]),
    "other finish": change_first(finish="error"),
    "no finish": change_first(finish=None),
    "stop without a stop token": change_first(token_ids=lambda ids: [*ids[:-1], 60], finish="stop"),
    "stop token inside": change_first(token_ids=lambda ids: [1, *ids[1:]]),
    "short": change_first(
        token_ids=lambda ids: ids[:1] if ids[0] != 1 else [60],
        logprobs=lambda values: values[:1],
        versions=[("default", 0, 1)],
        finish="length",
    ),
    "too long": change_first(
        token_ids=lambda ids: [60] * 40,
        logprobs=[-1.0] * 40,
        versions=[("default", 0, 40)],
        finish="length",
    ),
    "other version": change_first(versions=lambda spans: [("9", 0, spans[0][2])]),
    "version without an end": change_first(versions=lambda spans: [("default", 0, spans[0][2] + 1)]),
    "no version": change_first(versions=[]),
    "gap": change_first(versions=lambda spans: [("default", 1, spans[0][2])]),
}
# what it does to the bytes on their way
CONNECTION_FAULTS = ("close before the answer", "close in mid-body", "head of another length", "other id")


def as_json(request_id: str, choices: list[Choice]) -> dict[str, Any]:
    """vLLM's own form of an answer."""
    return {
        "request_id": f"generate-tokens-{request_id}",
        "choices": [
            {
                "index": choice.index,
                "token_ids": list(choice.token_ids),
                "finish_reason": choice.finish,
                "stop_reason": choice.stop_reason,
                "weight_versions": [
                    {"version": label, "start": start, "end": stop} for label, start, stop in choice.versions
                ],
                "logprobs": {
                    "content": [
                        {"token_id": token, "logprob": logprob}
                        for token, logprob in zip(choice.token_ids, choice.logprobs, strict=False)
                    ]
                },
            }
            for choice in choices
        ],
    }


class FakeApp:
    """The routes of vLLM. ``state`` is where the guard finds the engine."""

    def __init__(self, engine: FakeEngine, *, guarded: bool) -> None:
        self.engine = engine
        self.state = engine
        self.guarded = Guard(self, lambda state, request: state.sample(request)) if guarded else self

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = self
        fault = self.engine.fault
        if fault in CONNECTION_FAULTS and scope["path"].endswith("/generate"):
            send = spoil_connection(send, str(fault))
        await self.guarded(scope, receive, send)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        status, answer = 200, None
        try:
            answer = await self.answer(scope["path"], query, json.loads(body or b"{}"))
        except BadRequest as error:
            status, answer = error.status, {"error": str(error)}
        content = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def answer(self, path: str, query: dict[str, str], body: dict[str, Any]) -> Any:
        engine = self.engine
        if path == "/pause":
            await engine.pause(query["mode"])
            return {"status": "paused"}
        if path == "/resume":
            engine.resumed.set()
            return {"status": "resumed"}
        if path == "/inference/v1/generate":
            return as_json(body["request_id"], await engine.sample(body))
        if path == "/collective_rpc" and body["method"] == "rltrain_alive":
            while engine.is_stopped:
                await asyncio.sleep(STEP_SECONDS)
            return {"results": [None]}
        answers = {
            "/health": {},
            "/abort_requests": {},
            "/version": {"version": "0.32.0"},
            "/server_info": {"vllm_config": SERVER_INFO},
            "/get_world_size": {"world_size": 1},
            "/weight_info": {"weight_version": engine.label},
            "/is_paused": {"is_paused": not engine.resumed.is_set()},
            "/reset_prefix_cache": {"success": True},
        }
        if path not in answers:
            raise BadRequest(404, f"no route {path}")
        return answers[path]


SERVER_INFO = {
    "model_config": {
        "dtype": "torch.float32",
        "max_model_len": LONGEST,
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
        "quantization": None,
    },
    "scheduler_config": {"max_num_seqs": ROWS},
    "parallel_config": {"tensor_parallel_size": 1, "data_parallel_size": 1},
}


def spoil_connection(send: Any, fault: str) -> Any:
    """``send`` with the answer's bytes changed."""

    async def spoiled(message: Any) -> None:
        if message["type"] == "http.response.start":
            if fault == "close before the answer":
                raise ConnectionAbortedError(fault)
            await send(message)
            return
        body = message["body"]
        if fault == "close in mid-body":
            await send({**message, "body": body[: len(body) // 2], "more_body": True})
            raise ConnectionAbortedError(fault)
        if fault == "head of another length":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "other id":
            body = body.replace(b"rltrain", b"another")
        await send({**message, "body": body})

    return spoiled


@dataclass
class FakeWorker:
    url: str
    token: str
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop

    def set_fault(self, fault: str | None, count: int = 10**9) -> None:
        """From now on; ``count`` answers are spoilt."""
        self.engine.fault = fault
        self.engine.fault_count = count


@contextlib.contextmanager
def fake_worker(folder: Path, *, guarded: bool = True) -> Iterator[FakeWorker]:
    """A fake worker at a Unix socket in ``folder``, in a thread."""
    token = "fake-worker-token-0123456789"
    before = {name: os.environ.get(name) for name in (TOKEN, ADAPTER_FOLDER)}
    os.environ |= {TOKEN: token, ADAPTER_FOLDER: str(folder / "adapters")}
    started = threading.Event()
    holder: list[Any] = []

    async def serve() -> None:
        app = FakeApp(FakeEngine(), guarded=guarded)
        config = uvicorn.Config(
            app.serve, uds=str(folder / "s"), log_level="critical", interface="asgi3", lifespan="off"
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext
        holder.extend((app.engine, asyncio.get_running_loop(), server))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(20)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    engine, loop, server = holder
    try:
        yield FakeWorker(f"unix:{folder / 's'}", token, engine, loop)
    finally:
        server.force_exit = True
        server.should_exit = True
        thread.join(20)
