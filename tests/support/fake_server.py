"""What the process of a ``FakeWorker`` serves: the routes of vLLM 0.32 that the client calls, behind the real
guard, and weights that come through the real transport.

Its model is a table of next-token log-probs, which a push renews where it has weights of these names. The
client suite runs on it and on a real server, so that what it says stays what vLLM says.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import torch
from torch import Tensor

from rltrain.rollout.worker.guard import BadRequest, Choice, Guard
from rltrain.tensor_ops import weight_fingerprint
from rltrain.weight_transfer import Bucket, Membership, ProcessSums, TransferGroup, connect_store

VOCABULARY = 101
LONGEST = 256
ROWS = 32
STEP_SECONDS = 0.001  # of one token
SLOW_SECONDS = 0.3  # by which a slow call is late
# of the weights that the table of next-token log-probs is made of
TABLE_SHAPES = {"table": (VOCABULARY, VOCABULARY), "bias": (VOCABULARY,)}


@dataclass
class FakeWeights:
    """What the transport brings. ties: second name of a weight to its first, which alone is sent.

    damaged: a weight that stays as it is from now on. refusal: why the weights cannot be read back.
    """

    ties: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    damaged: str | None = None
    refusal: str = ""
    _arriving: dict[str, Tensor] | None = None
    _group: TransferGroup | None = None
    _proof: str = ""

    def join(self, init_info: dict[str, Any]) -> None:
        membership = Membership(**init_info)
        self._group = TransferGroup(connect_store(membership), membership, membership.rank_offset)

    def start(self) -> None:
        if self._arriving is not None:
            raise RuntimeError("an update is already active")
        self._arriving = {}

    def update(self, update_info: dict[str, Any]) -> None:
        bucket = Bucket(**update_info)
        assert self._group is not None and self._arriving is not None
        buffer = torch.empty(bucket.total_bytes, dtype=torch.uint8)
        if bucket.names:
            self._group.broadcast(buffer, bucket.seconds)
        self._arriving.update((name, tensor.clone()) for name, tensor in bucket.views(buffer))
        self._proof = bucket.proof

    def finish(self) -> None:
        assert self._arriving is not None
        if self.damaged is not None and self.damaged in self.tensors:
            self._arriving[self.damaged] = self.tensors[self.damaged]
        self.tensors = self._arriving
        self._arriving = None
        if self._proof:
            self.rltrain_fingerprint(self._proof)

    def rltrain_abandon(self) -> None:
        self._arriving = None

    def rltrain_fingerprint(self, key: str, names: str = "") -> None:
        assert self._group is not None
        tensors = self.tensors | {second: self.tensors[first] for second, first in self.ties.items()}
        subset = json.loads(names) if names else tensors
        fingerprints = {name: weight_fingerprint(name, tensors[name]) for name in subset}
        sums = {name: (value.projection, value.square, 0) for name, value in fingerprints.items()}
        self._group.publish(key, ProcessSums(sums, refusal=self.refusal).to_json())


@dataclass
class FakeEngine:
    """State of the server: the table of next-token log-probs (V, V), their label, and the faults.

    fault: of FAULTS or CONNECTION_FAULTS, in answers with completions. strike: what happens the next
    ``strikes`` times that ``route`` is called, a path or a method of the extension: "error", "slow", "die"
    or "stop" (SIGSTOP); of weights, from the second bucket on. die_after: tokens that it writes before its
    process is killed. keeps_cache: a pause clears nothing, so that requests under way go on with what they
    have computed from the weights before.
    """

    label: str = "default"
    fault: str | None = None
    fault_count: int = 10**9  # answers that the fault spoils before the worker is sound again
    logits: Any = field(
        default_factory=lambda: np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY))
    )
    weights: FakeWeights = field(default_factory=FakeWeights)
    running: int = 0
    answered: int = 0
    written: int = 0  # tokens
    ids: list[str] = field(default_factory=list)  # of the requests
    aborted: bool = False
    is_stopped: bool = False  # the processes behind the server
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    seconds: float = STEP_SECONDS  # of one token
    route: str | None = None
    strike: str = ""
    strikes: int = 1
    die_after: int | None = None
    keeps_cache: bool = False
    clears: int = 0  # of the cache

    def __post_init__(self) -> None:
        self.resumed.set()

    async def meet(self, route: str) -> None:
        """Strikes where the test said so."""
        if route != self.route:
            return
        self.strikes -= 1
        if self.strikes == 0:
            self.route, self.strikes = None, 1
        if self.strike == "error":
            raise BadRequest(500, "refused by order")
        if self.strike == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        else:
            os.kill(os.getpid(), signal.SIGKILL if self.strike == "die" else signal.SIGSTOP)

    def finish(self, version: str) -> None:
        self.weights.finish()
        tensors = self.weights.tensors
        if tensors.keys() == TABLE_SHAPES.keys():
            self.logits = (tensors["table"] + tensors["bias"]).double().numpy()
        self.label = version

    async def sample(self, request: dict[str, Any]) -> list[Choice]:
        require_sound(request)
        params = request["sampling_params"]
        self.running += params["n"]
        self.answered += 1
        self.ids.append(request["request_id"])
        try:
            rows = (self.sample_one(request["token_ids"][-1], params, index) for index in range(params["n"]))
            choices = list(await asyncio.gather(*rows))
        finally:
            self.running -= params["n"]
        if self.fault is None or self.fault_count <= 0:
            return choices
        self.fault_count -= 1
        return await FAULTS[self.fault](choices)

    async def pause(self, mode: str, *, clear_cache: bool) -> None:
        """As vLLM 0.32: abort answers with what is there, wait finishes, keep freezes."""
        self.clears += clear_cache and not self.keeps_cache
        self.aborted = mode == "abort"
        while mode != "keep" and self.running:
            await asyncio.sleep(STEP_SECONDS)
        self.aborted = False
        self.resumed.clear()

    def count_token(self) -> None:
        """Called before each token; the last one may be the process's end."""
        self.written += 1
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    async def sample_one(self, last: int, params: dict[str, Any], index: int) -> Choice:
        generator = np.random.default_rng(params["seed"] + index)
        tokens: list[int] = []
        logprobs: list[float] = []
        labels: list[str] = []
        cached, clears = self.logits, self.clears
        finish = "length"
        while len(tokens) < params["max_tokens"]:
            await asyncio.sleep(self.seconds)
            self.count_token()
            if self.aborted and tokens:
                finish = "abort"
                break
            await self.resumed.wait()
            if clears != self.clears or not tokens:
                cached, clears = self.logits, self.clears
            row = cached[last] / (params["temperature"] or 1.0)
            row = row - np.log(np.exp(row - row.max()).sum()) - row.max()
            greedy = params["temperature"] == 0
            last = int(row.argmax() if greedy else generator.choice(VOCABULARY, p=np.exp(row)))
            tokens.append(last)
            logprobs.append(float(np.float32(row[last])))
            labels.append(self.label)
            if last in params["stop_token_ids"]:
                finish = "stop"
                break
        stop = last if finish == "stop" else None
        return Choice(index, tokens, logprobs, finish, stop, find_spans(labels))


def find_spans(labels: list[str]) -> list[tuple[str, int, int]]:
    """(label, start, end) of each run of equal labels."""
    starts = [place for place in range(len(labels)) if place == 0 or labels[place] != labels[place - 1]]
    ends = [*starts[1:], len(labels)]
    return [(labels[start], start, end) for start, end in zip(starts, ends, strict=True)]


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


READ_PATHS = (
    "/health",
    "/version",
    "/server_info",
    "/get_world_size",
    "/weight_info",
    "/is_paused",
    "/metrics",
)


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
        status = 200
        try:
            if scope["method"] != ("GET" if scope["path"] in READ_PATHS else "POST"):
                raise BadRequest(405, f"no {scope['method']} here")
            answer = await self.answer(scope["path"], query, json.loads(body or b"{}"))
        except BadRequest as error:
            status, answer = error.status, {"error": str(error)}
        except (RuntimeError, TimeoutError, AssertionError, OSError) as error:
            status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def answer(self, path: str, query: dict[str, str], body: dict[str, Any]) -> Any:
        engine = self.engine
        is_early = path == "/update_weights" and body["update_info"]["index"] == 0
        await engine.meet("" if is_early else body.get("method", path))
        if path == "/pause":
            await engine.pause(query["mode"], clear_cache=query["clear_cache"] == "true")
            return {"status": "paused"}
        if path == "/resume":
            engine.resumed.set()
            return {"status": "resumed"}
        if path == "/inference/v1/generate":
            return as_json(body["request_id"], await engine.sample(body))
        if path == "/collective_rpc":
            return {"results": [await self._call_method(body["method"], body.get("kwargs", {}))]}
        if path == "/metrics":
            return METRICS.format(running=engine.running, written=engine.written).encode()
        calls = {
            "/init_weight_transfer_engine": lambda: engine.weights.join(body["init_info"]),
            "/start_weight_update": engine.weights.start,
            "/update_weights": lambda: engine.weights.update(body["update_info"]),
            "/finish_weight_update": lambda: engine.finish(body["weight_version"]),
        }
        if path in calls:
            await asyncio.to_thread(calls[path])
            return {}
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

    async def _call_method(self, method: str, arguments: dict[str, str]) -> Any:
        if method != "rltrain_alive":
            return await asyncio.to_thread(getattr(self.engine.weights, method), **arguments)
        while self.engine.is_stopped:
            await asyncio.sleep(STEP_SECONDS)
        return "alive"


METRICS = """# of one engine
vllm:num_requests_running{{engine="0",model_name="policy"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="policy"}} 0.0
vllm:generation_tokens_total{{engine="0",model_name="policy"}} {written}
"""
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
