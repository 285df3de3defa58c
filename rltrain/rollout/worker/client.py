"""One worker, by its address: typed calls, each with a deadline of its own.

The calls that control it block; a caller that has several workers uses threads. Completions are asked for
by a coroutine, thousands at a time. Imports no torch.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from rltrain.errors import TemporaryError, UserError
from rltrain.rollout.worker.answers import GarbageAnswer, GenerateRequest, check_choices, parse_json_answer
from rltrain.rollout.worker.guard import ADAPTER, GENERATE, INFO, SCORE, Choice, decode_answer, frame

__all__ = ["Seconds", "ServerInfo", "WorkerBusy", "WorkerClient", "WorkerLost", "WorkerRefused"]

JSON_GENERATE = "/inference/v1/generate"
_REASON_CHARACTERS = 300  # of a server's own message, in an error
_CONNECT_SECONDS = 5.0
# A connection that has been idle for longer is not used again: the server closes it after 5 s (uvicorn's
# keep-alive), and a request that meets the close would look like the worker's death.
_IDLE_SECONDS = 2.0


class WorkerLost(TemporaryError):
    """The worker cannot be reached, does not answer in time, or its engine has failed."""


class WorkerBusy(RuntimeError):
    """The worker does not serve this now (503), for example because it is paused; it is not lost."""


class WorkerRefused(RuntimeError):
    """The worker answered that the call is wrong."""


@dataclass(frozen=True)
class Seconds:
    """The deadlines of the calls."""

    call: float = 30.0  # of a call that only reads or switches something
    update: float = 300.0  # of a call that moves weights
    generate: float = 1800.0  # of a request for completions
    alive: float = 5.0  # of a round trip through the worker


@dataclass(frozen=True)
class ServerInfo:
    """What a server says that it runs with."""

    version: str  # of vLLM
    dtype: str
    max_model_len: int
    max_num_seqs: int
    logprobs_mode: str
    seed: int
    quantization: str | None
    tensor_parallel: int
    data_parallel: int
    is_guarded: bool  # rltrain's guard answers there, so that completions come as bytes
    adapter_rank: int = 0  # the largest of the adapters that it takes beside its base; 0: it takes none


@dataclass
class WorkerClient:
    """Implements ``sync.targets.WorkerControl``.

    url: ``http://``, ``https://`` or ``unix:PATH``. authority: file with the certificates that an https
    server is checked against; None: the system's. Raises WorkerLost where the worker does not answer,
    WorkerBusy, WorkerRefused, and UserError where it asks for another token.
    """

    url: str
    token: str = field(repr=False)
    seconds: Seconds = Seconds()
    authority: Path | None = None
    is_guarded: bool | None = None  # None: not asked yet

    def __post_init__(self) -> None:
        scheme = self.url.partition(":")[0]
        if scheme not in ("http", "https", "unix"):
            raise UserError(
                f"worker url {self.url!r}: expected http://HOST:PORT, https://HOST:PORT or unix:PATH"
            )
        self._socket = self.url.removeprefix("unix:") if scheme == "unix" else None
        self._base = "http://worker" if self._socket is not None else self.url.rstrip("/")
        self._context: ssl.SSLContext | bool = False
        if scheme == "https":
            self._context = ssl.create_default_context(cafile=self.authority)
        self._headers = {"Authorization": f"Bearer {self.token}"}
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(
                uds=self._socket,
                verify=self._context,
                limits=httpx.Limits(keepalive_expiry=_IDLE_SECONDS),
            ),
            base_url=self._base,
            headers=self._headers,
        )
        self._async_client: httpx.AsyncClient | None = None

    # control ------------------------------------------------------------------------------------------------

    def pause(self, mode: Literal["keep", "wait", "abort"], clear_cache: bool) -> None:
        """Stops sampling. keep: requests stay and go on after ``resume``, with their cache computed anew if
        ``clear_cache``; abort: they are answered with what they have; wait: they are finished first.
        """
        self._post("/pause", query={"mode": mode, "clear_cache": str(clear_cache).lower()})

    def resume(self) -> None:
        """Samples again. Never after a transfer that failed: vLLM's engine would die of it."""
        self._post("/resume")

    def is_paused(self) -> bool:
        return bool(self._get("/is_paused")["is_paused"])

    def init_transfer(self, init_info: Mapping[str, object]) -> None:
        """Blocks until every member of the transfer's process group has joined."""
        self._post("/init_weight_transfer_engine", {"init_info": dict(init_info)}, self.seconds.update)

    def start_update(self) -> None:
        self._post("/start_weight_update", seconds=self.seconds.update)

    def update(self, update_info: Mapping[str, object]) -> None:
        """Blocks until the bucket has arrived."""
        self._post("/update_weights", {"update_info": dict(update_info)}, self.seconds.update)

    def finish_update(self, version: str) -> None:
        self._post("/finish_weight_update", {"weight_version": version}, self.seconds.update)

    def weight_version(self) -> str:
        """The label of the weights, which proves nothing about them."""
        return str(self._get("/weight_info")["weight_version"])

    def world_size(self) -> int:
        """Number of the server's processes that hold weights: tensor x pipeline x data parallel."""
        return int(self._get("/get_world_size", {"include_dp": "true"})["world_size"])

    def call_workers(self, method: str, arguments: Mapping[str, str]) -> list[object]:
        """Calls a method of the extension in every process that holds weights; their answers by rank."""
        body = {"method": method, "kwargs": dict(arguments), "timeout": self.seconds.update}
        return list(self._post("/collective_rpc", body, self.seconds.update)["results"])

    def require_alive(self) -> None:
        """A round trip through the processes that hold weights: ``/health`` answers while they are stopped.

        Raises WorkerLost where they do not answer within ``seconds.alive``.
        """
        body = {"method": "rltrain_alive", "timeout": self.seconds.alive}
        self._post("/collective_rpc", body, self.seconds.alive)

    def reset_cache(self) -> None:
        """Raises WorkerRefused where the prefix cache is in use and stays."""
        if not self._post("/reset_prefix_cache").get("success", True):
            raise WorkerRefused(f"{self.url} kept its prefix cache; are requests still running?")

    def abort_requests(self, ids: Collection[str] = ()) -> None:
        """ids: of the requests; none: all."""
        self._post("/abort_requests", {"request_ids": list(ids)} if ids else {})

    def read_info(self) -> ServerInfo:
        data = self._get("/server_info", {"config_format": "json"})["vllm_config"]
        model = data["model_config"]
        parallel = data["parallel_config"]
        self.is_guarded = self._find_guard()
        return ServerInfo(
            version=str(self._get("/version")["version"]),
            dtype=str(model["dtype"]).removeprefix("torch."),
            max_model_len=int(model["max_model_len"]),
            max_num_seqs=int(data["scheduler_config"]["max_num_seqs"]),
            logprobs_mode=str(model["logprobs_mode"]),
            seed=int(model["seed"]),
            quantization=model["quantization"],
            tensor_parallel=int(parallel["tensor_parallel_size"]),
            data_parallel=int(parallel["data_parallel_size"]),
            is_guarded=self.is_guarded,
            adapter_rank=int((data.get("lora_config") or {}).get("max_lora_rank", 0)),
        )

    # adapters -----------------------------------------------------------------------------------------------

    def upload_adapter(self, name: str, folder: Path) -> str:
        """Sends the files of one version of an adapter; returns their folder on the worker's machine."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        head = {"name": name, "files": {file: len(data) for file, data in files.items()}}
        body = frame(head, *files.values())
        response = self._send("POST", ADAPTER, self.seconds.update, content=body)
        return str(response.json()["path"])

    def load_adapter(self, name: str, path: str) -> None:
        """Offers the adapter in that folder as ``name``; each version has a name and a folder of its own."""
        body = {"lora_name": name, "lora_path": path}
        self._send("POST", "/v1/load_lora_adapter", self.seconds.update, json=body)

    def find_adapters(self) -> dict[str, int]:
        """vLLM's numbers of the adapters that are loaded, by name.

        Raises WorkerRefused where the server takes no adapters.
        """
        info = self._get(INFO)
        if not info.get("adapters"):
            raise WorkerRefused(
                f"{self.url} takes no adapters: start it with rltrain worker and a recipe with model.adapter"
            )
        return {str(name): int(number) for name, number in info["loaded"].items()}

    def unload_adapter(self, name: str) -> None:
        """Forgets the adapter and its files. One that is not there is no error."""
        if name in self.find_adapters():
            self._send("POST", "/v1/unload_lora_adapter", self.seconds.call, json={"lora_name": name})
        self._send("DELETE", ADAPTER, self.seconds.call, json={"name": name})

    def score(self, token_ids: Sequence[int], model: str) -> list[float]:
        """Nats of each token but the first, at temperature 1. model: the base's name, or an adapter's."""
        body = {"token_ids": list(token_ids), "model": model}
        return [float(value) for value in self._post(SCORE, body, self.seconds.update)["logprobs"]]

    # completions --------------------------------------------------------------------------------------------

    async def generate(
        self, request: GenerateRequest, *, vocabulary: int, labels: Collection[str]
    ) -> list[Choice]:
        """The completions, in the order of their samples, as ``check_choices`` passes them.

        As bytes from a server with rltrain's guard, as JSON from any other. Cancelling it ends the request.
        Raises GarbageAnswer beside what every call raises.
        """
        is_guarded = self.is_guarded
        if is_guarded is None:
            is_guarded = await asyncio.to_thread(self._find_guard)
            self.is_guarded = is_guarded
        path = GENERATE if is_guarded else JSON_GENERATE
        body = request.body() if is_guarded else {**request.body(), "stream": False}
        try:
            async with asyncio.timeout(self.seconds.generate):
                response = await self._open_async_client().post(path, json=body)
        except TimeoutError as error:
            raise WorkerLost(
                f"{self.url} has not answered request {request.id} within {self.seconds.generate:g} s"
            ) from error
        except httpx.HTTPError as error:
            raise self._describe_loss(path, error) from error
        self._check_status(response, path)
        try:
            answer = decode_answer(response.content) if is_guarded else parse_json_answer(response.content)
        except ValueError as error:
            raise GarbageAnswer(f"{self.url}: {error}") from error
        return check_choices(request, *answer, vocabulary=vocabulary, labels=labels)

    async def close_async(self) -> None:
        """Closes the connections of ``generate``, in its event loop."""
        if self._async_client is not None:
            await self._async_client.aclose()
            self._async_client = None

    def close(self) -> None:
        """Closes the connections of the calls that block."""
        self._client.close()

    # calls --------------------------------------------------------------------------------------------------

    def _open_async_client(self) -> httpx.AsyncClient:
        """One for all requests, made in the event loop that uses it."""
        if self._async_client is None:
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE_SECONDS
            )
            transport = httpx.AsyncHTTPTransport(uds=self._socket, verify=self._context, limits=limits)
            timeout = httpx.Timeout(self.seconds.generate, connect=_CONNECT_SECONDS)
            self._async_client = httpx.AsyncClient(
                transport=transport, base_url=self._base, headers=self._headers, timeout=timeout
            )
        return self._async_client

    def _find_guard(self) -> bool:
        try:
            return self._get(INFO).get("rltrain") == 1
        except WorkerRefused:
            return False

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._read_json(self._send("GET", path, self.seconds.call, params=query))

    def _post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        query: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        response = self._send("POST", path, seconds or self.seconds.call, json=body, params=query)
        return self._read_json(response) if response.content else {}

    def _send(self, method: str, path: str, seconds: float, **content: Any) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        try:
            response = self._client.request(method, path, timeout=timeout, **content)
        except httpx.TimeoutException as error:
            raise WorkerLost(f"{self.url} has not answered {path} within {seconds:g} s") from error
        except httpx.HTTPError as error:
            raise self._describe_loss(path, error) from error
        self._check_status(response, path)
        return response

    def _read_json(self, response: httpx.Response) -> dict[str, Any]:
        path = response.request.url.path
        try:
            data = response.json()
        except json.JSONDecodeError as error:
            raise GarbageAnswer(f"{self.url} answered {path} with something else than JSON") from error
        if not isinstance(data, dict):
            raise GarbageAnswer(f"{self.url} answered {path} with {type(data).__name__}, expected an object")
        return data

    def _describe_loss(self, path: str, error: httpx.HTTPError) -> WorkerLost:
        return WorkerLost(f"{self.url} cannot be reached for {path}: {type(error).__name__} {error}".strip())

    def _check_status(self, response: httpx.Response, path: str) -> None:
        status = response.status_code
        if status == 200:
            return
        reason = " ".join(response.text.split())[:_REASON_CHARACTERS]
        if status == 401:
            raise UserError(
                f"{self.url} asks for another token: set RLTRAIN_WORKER_TOKEN to the one that rltrain worker "
                "was started with"
            )
        if status == 503:
            raise WorkerBusy(f"{self.url} does not serve {path} now: {reason}")
        if status >= 500:
            raise WorkerLost(f"{self.url} answered {path} with {status}: {reason}")
        raise WorkerRefused(f"{self.url} refuses {path} with {status}: {reason}")
