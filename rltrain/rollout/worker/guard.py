"""What stands in front of every route of a vLLM server: the run's token, limits on bodies, and routes of
rltrain's own.

vLLM's own key leaves ``/update_weights``, ``/pause`` and ``/collective_rpc`` open. This ASGI middleware asks
for the token on every path but ``/health``. Its routes:

    GET  /rltrain/v1/info      what this worker is
    POST /rltrain/v1/generate  token ids in; ids and log-probs out, 8 bytes a token
    POST /rltrain/v1/score     token ids in; their log-probs out
    POST /rltrain/v1/adapter   the files of one version of an adapter, for workers without a shared disk;
                               DELETE removes them

Besides the standard library it imports only vLLM, and that only to sample: a server loads it at its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import secrets
import shutil
import struct
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "ADAPTER",
    "ADAPTER_FOLDER",
    "GENERATE",
    "INFO",
    "SCORE",
    "TOKEN",
    "BadRequest",
    "Choice",
    "Guard",
    "decode_answer",
    "encode_answer",
    "frame",
]

TOKEN = "RLTRAIN_WORKER_TOKEN"  # environment variable with the run's token
ADAPTER_FOLDER = "RLTRAIN_ADAPTER_FOLDER"  # environment variable; without it no adapter can be uploaded
OPEN = "/health"
INFO = "/rltrain/v1/info"
GENERATE = "/rltrain/v1/generate"
SCORE = "/rltrain/v1/score"
ADAPTER = "/rltrain/v1/adapter"

SHORTEST_TOKEN = 16  # characters
MAX_BODY = 32 * 2**20  # bytes of a request, vLLM 0.33's own limit
MAX_ADAPTER = 8 * 2**30  # bytes of an upload, which goes to disk as it arrives
MAX_HEAD = 2**20  # bytes of the JSON before an upload's files
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_LENGTH = struct.Struct("<I")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class App(Protocol):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class BadRequest(Exception):
    """The answer to a request that cannot be served: a status and what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ClientGone(Exception):
    """The client has closed the connection, so nobody waits for an answer."""


@dataclass(frozen=True)
class Choice:
    """One completion. versions: (label, start, stop) of the weights that sampled its tokens. worker: which
    sampled it, where there are several.
    """

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish: str | None
    stop_reason: int | str | None = None
    versions: Sequence[tuple[str, int, int]] = field(default_factory=tuple)
    worker: str = ""


# (the server's state, request) -> the completions
SampleChoices = Callable[[Any, dict[str, Any]], Awaitable[Sequence[Choice]]]
# (the server's state, request) -> the log-probs of all tokens but the first
ScoreTokens = Callable[[Any, dict[str, Any]], Awaitable[Sequence[float]]]


def frame(head: dict[str, Any], *parts: bytes) -> bytes:
    """The length of the head (uint32, little-endian), the head as JSON, and the parts."""
    text = json.dumps(head).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *parts))


def encode_answer(request_id: str, choices: Sequence[Choice]) -> bytes:
    """A frame whose parts are all token ids (int32) and all log-probs (float32), little-endian, choice after
    choice.
    """
    head = {
        "request_id": request_id,
        "choices": [
            {
                "index": choice.index,
                "tokens": len(choice.token_ids),
                "logprobs": len(choice.logprobs),
                "finish_reason": choice.finish,
                "stop_reason": choice.stop_reason,
                "weight_versions": [list(span) for span in choice.versions],
            }
            for choice in choices
        ],
    }
    ids = array("i", (token for choice in choices for token in choice.token_ids))
    logprobs = array("f", (value for choice in choices for value in choice.logprobs))
    return frame(head, _little_endian(ids), _little_endian(logprobs))


def decode_answer(body: bytes) -> tuple[str, list[Choice]]:
    """(request id, choices) of ``encode_answer``. Raises ValueError for a body that is no such frame."""
    if len(body) < _LENGTH.size or len(body) < _LENGTH.size + _LENGTH.unpack_from(body)[0]:
        raise ValueError(f"an answer of {len(body)} bytes ends within its head")
    start = _LENGTH.size
    stop = start + _LENGTH.unpack_from(body)[0]
    try:
        head = json.loads(body[start:stop])
        sizes = [(int(entry["tokens"]), int(entry["logprobs"])) for entry in head["choices"]]
        ids = sum(tokens for tokens, _ in sizes)
        logprobs = sum(count for _, count in sizes)
        if len(body) != stop + 4 * (ids + logprobs):
            raise ValueError(f"its head announces {stop + 4 * (ids + logprobs)} bytes, {len(body)} arrived")
        token_ids = _numbers("i", body[stop : stop + 4 * ids])
        values = _numbers("f", body[stop + 4 * ids :])
        choices: list[Choice] = []
        place = 0
        spot = 0
        for entry, (tokens, count) in zip(head["choices"], sizes, strict=True):
            choices.append(
                Choice(
                    entry["index"],
                    token_ids[place : place + tokens].tolist(),
                    values[spot : spot + count].tolist(),
                    entry["finish_reason"],
                    entry["stop_reason"],
                    [(label, first, last) for label, first, last in entry["weight_versions"]],
                )
            )
            place += tokens
            spot += count
        return str(head["request_id"]), choices
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"an answer with a head that cannot be read: {type(error).__name__} {error}"
        ) from error


def _little_endian(numbers: array[Any]) -> bytes:
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        numbers.byteswap()
    return numbers.tobytes()


def _numbers(kind: str, data: bytes) -> array[Any]:
    numbers: array[Any] = array(kind)
    numbers.frombytes(data)
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        numbers.byteswap()
    return numbers


class Guard:
    """ASGI middleware; vLLM makes one with ``--middleware``. sample: writes the completions of ``GENERATE``.

    Raises RuntimeError at its start, before anything is served, where the environment holds no token.
    """

    def __init__(
        self, app: App, sample: SampleChoices | None = None, score: ScoreTokens | None = None
    ) -> None:
        token = os.environ.get(TOKEN, "")
        if len(token) < SHORTEST_TOKEN:
            raise RuntimeError(
                f"{TOKEN} has {len(token)} characters, expected at least {SHORTEST_TOKEN}: start the server "
                "with rltrain worker, which makes one, or set it"
            )
        self._expected = f"Bearer {token}".encode()
        self._app = app
        self._sample = sample or sample_with_vllm
        self._score = score or score_with_vllm
        folder = os.environ.get(ADAPTER_FOLDER)
        self._adapters = None if folder is None else Path(folder)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "not served"})
        else:
            try:
                await self._serve(scope, receive, send)
            except BadRequest as error:
                await _answer(send, error.status, {"error": str(error)})
            except ClientGone:
                pass

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path != OPEN and not self._is_authorized(scope):
            raise BadRequest(
                401, "no token, or another run's: send Authorization: Bearer and the run's token"
            )
        limit = MAX_ADAPTER if path == ADAPTER else MAX_BODY
        _require_length(scope, limit)
        if path == INFO:
            loaded = {} if self._adapters is None else find_loaded_adapters(scope["app"].state)
            await _answer(send, 200, {"rltrain": 1, "adapters": self._adapters is not None, "loaded": loaded})
        elif path == GENERATE:
            await self._generate(scope, receive, send)
        elif path == SCORE:
            await self._score_tokens(scope, receive, send)
        elif path == ADAPTER and scope["method"] == "DELETE":
            await self._remove_adapter(receive, send)
        elif path == ADAPTER:
            await self._store_adapter(scope, receive, send)
        else:
            await self._app(scope, _limit_body(receive, limit), send)

    def _is_authorized(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(values) == 1 and hmac.compare_digest(values[0], self._expected)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        _require_method(scope, "POST")
        request, request_id = await _read_field(receive, "request_id")
        work = asyncio.ensure_future(self._sample(scope["app"].state, request))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            answer = encode_answer(request_id, work.result())
        finally:
            for task in (work, leaving):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, BadRequest):
                    await task
        await _answer(send, 200, answer)

    async def _score_tokens(self, scope: Scope, receive: Receive, send: Send) -> None:
        _require_method(scope, "POST")
        request, _ = await _read_field(receive, "token_ids")
        await _answer(send, 200, {"logprobs": list(await self._score(scope["app"].state, request))})

    async def _remove_adapter(self, receive: Receive, send: Send) -> None:
        """Removes the files; an adapter that vLLM has loaded stays loaded."""
        _, name = await _read_field(receive, "name")
        if not isinstance(name, str) or _ADAPTER_NAME.fullmatch(name) is None:
            raise BadRequest(400, f"adapter name {name!r}: letters, digits, dots, dashes, at most 128")
        if self._adapters is not None:
            shutil.rmtree(self._adapters / name, ignore_errors=True)  # one that is gone is no fault
        await _answer(send, 200, {"name": name})

    async def _store_adapter(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes an adapter's files beside their place, then renames: a folder is whole or absent."""
        _require_method(scope, "POST")
        if self._adapters is None:
            raise BadRequest(404, f"this worker takes no adapters: it was started without {ADAPTER_FOLDER}")
        stream = _Stream(_read_body(receive, MAX_ADAPTER))
        name, sizes = _read_adapter_head(await stream.take_head())
        target = self._adapters / name
        if target.exists():
            raise BadRequest(409, f"adapter {name!r} is here already: every version has a name of its own")
        partial = self._adapters / f".{name}.{secrets.token_hex(4)}"
        partial.mkdir(parents=True, mode=0o700)
        try:
            for file, size in sizes.items():
                with (partial / file).open("wb") as out:
                    async for part in stream.take(size):
                        out.write(part)
                    out.flush()
                    os.fsync(out.fileno())
            await stream.require_end()
            partial.rename(target)
        except OSError as error:
            raise BadRequest(507, f"adapter {name!r} cannot be stored: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        await _answer(send, 200, {"path": str(target)})


class _Stream:
    """The bytes of a body, taken piece by piece."""

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts
        self._rest = b""

    async def take(self, size: int) -> AsyncIterator[bytes]:
        """The next ``size`` bytes. Raises BadRequest where fewer arrive."""
        while size > 0:
            if not self._rest:
                self._rest = await anext(self._parts, b"")
                if not self._rest:
                    raise BadRequest(400, f"the body ends {size} bytes before the last file does")
            part = self._rest[:size]
            self._rest = self._rest[size:]
            size -= len(part)
            yield part

    async def take_head(self) -> bytes:
        length = _LENGTH.unpack(b"".join([part async for part in self.take(_LENGTH.size)]))[0]
        if length > MAX_HEAD:
            raise BadRequest(413, f"a head of {length} bytes; at most {MAX_HEAD}")
        return b"".join([part async for part in self.take(length)])

    async def require_end(self) -> None:
        if self._rest or await anext(self._parts, b""):
            raise BadRequest(400, "the body goes on after the last file")


def _read_adapter_head(head: bytes) -> tuple[str, dict[str, int]]:
    """(name, bytes of each file) of an upload. Raises BadRequest for other names than an adapter's."""
    try:
        data = json.loads(head)
        name = data["name"]
        sizes = {str(file): int(size) for file, size in data["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRequest(400, f"expected {{name, files: {{file: bytes}}}}: {error}") from error
    if not isinstance(name, str) or _ADAPTER_NAME.fullmatch(name) is None:
        raise BadRequest(400, f"adapter name {name!r}: letters, digits, dots, dashes, at most 128")
    if set(sizes) != set(ADAPTER_FILES) or min(sizes.values()) < 0:
        raise BadRequest(400, f"files {sorted(sizes)}; expected {', '.join(ADAPTER_FILES)}")
    return name, sizes


async def _read_field(receive: Receive, name: str) -> tuple[dict[str, Any], Any]:
    """A request's JSON object and its field ``name``. Raises BadRequest for another body."""
    body = b"".join([part async for part in _read_body(receive, MAX_BODY)])
    try:
        request = json.loads(body)
        return request, request[name]
    except (ValueError, TypeError, KeyError) as error:
        raise BadRequest(400, f"expected a JSON object with {name}: {error}") from error


def find_loaded_adapters(state: Any) -> dict[str, int]:
    """vLLM's numbers of the adapters that requests may name, by name."""
    models = getattr(state, "openai_serving_models", None)
    loaded = {} if models is None else models.lora_requests
    return {name: request.lora_int_id for name, request in loaded.items()}


async def sample_with_vllm(state: Any, request: dict[str, Any]) -> list[Choice]:
    """Samples with the server's engine. Raises BadRequest where vLLM refuses the request.

    A request with a ``label`` names the version that its ``model`` is, and the choices bear it: vLLM's own
    label is of the base, whichever adapter samples.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    _require_sound(state.engine_client.vllm_config, request)
    try:
        params = SamplingParams(
            **request["sampling_params"], flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = TokensPrompt(prompt_token_ids=request["token_ids"], cache_salt=request["cache_salt"])
        (rendered,) = await state.online_renderer.renderer.render_cmpl_async([prompt])
        lora = _find_adapter(state, request.get("model"))
        final: Any = None
        async for output in state.engine_client.generate(
            rendered,
            params,
            request["request_id"],
            priority=request.get("priority", 0),
            lora_request=lora,
            data_parallel_rank=request.get("data_parallel_rank"),
        ):
            final = output
    except (ValueError, TypeError, KeyError) as error:
        raise BadRequest(400, f"{type(error).__name__}: {error}") from error
    return [
        Choice(
            output.index,
            output.token_ids,
            [] if output.logprobs is None else output.logprobs.logprobs,
            output.finish_reason,
            output.stop_reason,
            _label_spans(output.weight_versions or (), request.get("label")),
        )
        for output in final.outputs
    ]


def _label_spans(spans: Sequence[Any], label: str | None) -> list[tuple[str, int, int]]:
    """(label, start, stop) of the weights that sampled. label: of the request; None: vLLM's own."""
    if label is not None and len(spans) == 1:  # a base that changed in between keeps its two labels
        return [(label, spans[0].start, spans[0].end)]
    return [(span.version, span.start, span.end) for span in spans]


async def score_with_vllm(state: Any, request: dict[str, Any]) -> list[float]:
    """Nats of each token but the first, at temperature 1. Raises BadRequest where vLLM refuses them."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = {"n": 1, "max_tokens": 1, "temperature": 1.0, "seed": 0, "ignore_eos": True, "detokenize": False}
    _require_sound(state.engine_client.vllm_config, {**request, "sampling_params": params})
    tokens = request["token_ids"]
    identity = secrets.token_hex(8)
    prompt = TokensPrompt(prompt_token_ids=tokens, cache_salt=f"score {identity}")
    (rendered,) = await state.online_renderer.renderer.render_cmpl_async([prompt])
    final: Any = None
    try:
        async for output in state.engine_client.generate(
            rendered,
            SamplingParams(**params, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY),
            f"rltrain-score-{identity}",
            lora_request=_find_adapter(state, request.get("model")),
        ):
            final = output
    except (ValueError, TypeError) as error:
        raise BadRequest(400, f"{type(error).__name__}: {error}") from error
    return [
        logprobs[token].logprob for token, logprobs in zip(tokens[1:], final.prompt_logprobs[1:], strict=True)
    ]


def _require_sound(config: Any, request: dict[str, Any]) -> None:
    """Raises BadRequest for what vLLM's engine does not survive, or would shorten without a word.

    vLLM checks these on its own routes only: an empty prompt in its engine ends the server.
    """
    try:
        tokens = request["token_ids"]
        params = request["sampling_params"]
        n = params["n"]
        longest = len(tokens) + params["max_tokens"]
        vocabulary = config.model_config.get_vocab_size()
        if not tokens or not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
            raise BadRequest(400, f"token_ids: expected at least one, each from 0 to {vocabulary - 1}")
        if params["max_tokens"] < 1 or longest > config.model_config.max_model_len:
            raise BadRequest(
                400,
                f"{len(tokens)} prompt tokens and max_tokens {params['max_tokens']}; the longest row has "
                f"{config.model_config.max_model_len}",
            )
        if type(n) is not int or not 1 <= n <= config.scheduler_config.max_num_seqs:
            raise BadRequest(400, f"n is {n}; expected 1 to {config.scheduler_config.max_num_seqs}")
    except (KeyError, TypeError) as error:
        raise BadRequest(400, f"token_ids, sampling_params n and max_tokens: {error}") from error


def _find_adapter(state: Any, model: str | None) -> Any:
    """vLLM's request for the adapter of that name; None for the base model. Raises BadRequest otherwise."""
    models = state.openai_serving_models
    if model is None or models.is_base_model(model):
        return None
    if model not in models.lora_requests:
        raise BadRequest(404, f"model {model!r} is neither the base nor an adapter that is loaded")
    return models.lora_requests[model]


def _require_method(scope: Scope, method: str) -> None:
    if scope["method"] != method:
        raise BadRequest(405, f"{scope['path']} takes {method}, not {scope['method']}")


def _require_length(scope: Scope, limit: int) -> None:
    """Refuses a body that announces too many bytes, before any of it is read."""
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and (not value.isdigit() or int(value) > limit):
            raise BadRequest(413, f"a body of {value.decode('latin-1')} bytes; at most {limit}")


def _limit_body(receive: Receive, limit: int) -> Receive:
    """``receive``, which ends a body that goes on past the limit, as one without a length may."""
    count = 0

    async def receive_limited() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > limit:
            raise BadRequest(413, f"a body of more than {limit} bytes")
        return message

    return receive_limited


async def _read_body(receive: Receive, limit: int) -> AsyncIterator[bytes]:
    """The parts of a body. Raises ClientGone where the client leaves before its end."""
    receive_limited = _limit_body(receive, limit)
    while True:
        message = await receive_limited()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, content: dict[str, Any] | bytes) -> None:
    is_binary = isinstance(content, bytes)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    kind = b"application/octet-stream" if is_binary else b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
