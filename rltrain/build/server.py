"""Builds the engine that samples on a vLLM server: started here on rank 0, or named by its url."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rltrain.config.schema import BUCKET_MIB_CPU, BUCKET_MIB_GPU, Data, Model, Rollout, Server
from rltrain.data.tokenization import Tokenization
from rltrain.errors import UserError
from rltrain.process import Process
from rltrain.remote_code import trusts
from rltrain.rollout.engines.checks import WeightShapes
from rltrain.rollout.engines.vllm_server import VllmServer, require_settings
from rltrain.rollout.worker.client import Seconds, WorkerClient
from rltrain.rollout.worker.flags import WorkerSettings, worker_settings
from rltrain.rollout.worker.guard import SHORTEST_TOKEN, TOKEN
from rltrain.rollout.worker.process import LocalWorker
from rltrain.rollout.worker.requests import ServerModel
from rltrain.sync.adapter_server import AdapterLink
from rltrain.sync.server import WorkerLink
from rltrain.sync.transport import Pace
from rltrain.weight_names import CheckpointNames

__all__ = [
    "attach_engine",
    "build_server_engine",
    "connect",
    "find_token",
    "free_devices",
    "make_link",
    "make_served_model",
    "read_names",
    "visible_devices",
]


def build_server_engine(
    model: Model,
    data: Data,
    rollout: Rollout,
    precision: str,
    tokenization: Tokenization,
    process: Process,
) -> VllmServer:
    """The engine on every rank, without weights; rank 0 starts the server and sends the weights.

    Raises UserError where the server cannot start, or a running one samples otherwise than the recipe asks.
    """
    on_gpu = process.device.type == "cuda"
    settings = worker_settings(model, data, rollout, precision, on_gpu=on_gpu)
    worker = None
    if rollout.server.url is None and process.is_main:
        worker = _start_worker(settings, rollout.server)
    try:
        started = [] if worker is None else [(worker.address.url, worker.token)]
        url, token = _find_server(rollout.server) if rollout.server.url else process.gather(started)[0]
        client = connect(url, token, rollout.server)
        require_settings(client.read_info(), settings, url)
        length = settings.max_model_len
        return attach_engine(client, model, tokenization, length, process, worker, rollout.server.bucket_mib)
    except BaseException:
        if worker is not None:
            worker.close()
        raise


def attach_engine(
    client: WorkerClient,
    model: Model,
    tokenization: Tokenization,
    max_model_len: int,
    process: Process,
    worker: LocalWorker | None = None,
    bucket_mib: int | None = None,
) -> VllmServer:
    """The engine on a server that serves. worker: the server's process, if ``close`` must end it."""
    names = read_names(model)
    info = client.read_info()
    link = None
    if process.is_main:
        dtype = getattr(torch, info.dtype)
        link = make_link(f"the worker at {client.url}", client, dtype, names, process, bucket_mib)
    served = make_served_model(names, tokenization, max_model_len)
    pusher, adapters = (link, None) if model.adapter is None else (None, link and AdapterLink(link))
    return VllmServer(client, info, served, pusher, adapters=adapters, worker=worker, gather=process.gather)


def make_link(
    name: str,
    client: WorkerClient,
    dtype: torch.dtype,
    names: CheckpointNames,
    process: Process,
    bucket_mib: int | None,
) -> WorkerLink:
    """The way of the learner's weights to a worker. dtype: of the worker's weights."""
    on_gpu = process.device.type == "cuda"
    return WorkerLink(
        name=name,
        control=client,
        dtype=dtype,
        ties=names.ties,
        capacity=2**20 * (bucket_mib or (BUCKET_MIB_GPU if on_gpu else BUCKET_MIB_CPU)),
        device=process.device,
        host=_own_address(client.url),
        backend="nccl" if on_gpu else "gloo",
        pace=Pace(seconds=client.seconds.call, alive_seconds=client.seconds.alive),
    )


def make_served_model(names: CheckpointNames, tokenization: Tokenization, max_model_len: int) -> ServerModel:
    return ServerModel(
        WeightShapes(names.shapes, names.parameters),
        tokenization.vocabulary,
        tuple(sorted(tokenization.stop_tokens.stop)),
        tokenization.decode,
        max_model_len,
    )


def _start_worker(settings: WorkerSettings, server: Server) -> LocalWorker:
    """A server on this machine, which serves when this returns."""
    if settings.on_gpu:
        learners = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = server.tensor_parallel * server.data_parallel
        settings = replace(settings, devices=free_devices(visible_devices(), learners, needed))
    worker = LocalWorker(settings)
    try:
        worker.wait_until_serving(server.silence_seconds)
    except BaseException:
        worker.close()
        raise
    return worker


def visible_devices() -> list[str]:
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return names.split(",") if names else [str(index) for index in range(torch.cuda.device_count())]


def free_devices(visible: list[str], learners: int, needed: int) -> tuple[str, ...]:
    """The GPUs of a server: the last ``needed`` of those that no rank of the learner uses.

    Raises UserError where they do not suffice: a server cannot give its memory to the learner, as the
    colocated engine does.
    """
    if len(visible) < learners + needed:
        raise UserError(
            f"rollout.engine vllm_server needs {needed} GPUs of its own (rollout.server.tensor_parallel x "
            f"data_parallel), and this machine shows {len(visible)} of which the learner uses {learners}; "
            "start fewer ranks, name a worker on another machine in rollout.server.url, or use "
            "rollout.engine vllm, which shares the learner's GPUs"
        )
    return tuple(visible[len(visible) - needed :])


def _find_server(server: Server) -> tuple[str, str]:
    """(url, token) of the server that the recipe names."""
    assert server.url is not None
    return server.url, find_token(f"rollout.server.url {server.url}")


def find_token(key: str) -> str:
    """The token of running workers. key: of the recipe, which names them."""
    token = os.environ.get(TOKEN, "")
    if len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"{key} names running workers, and {TOKEN} has {len(token)} characters: set it to the secret "
            "that rltrain worker was started with"
        )
    return token


def connect(url: str, token: str, server: Server) -> WorkerClient:
    """server: the deadlines, and the certificates that an https server is checked against."""
    seconds = Seconds(call=server.call_seconds, alive=server.liveness_seconds)
    authority = None if server.authority is None else Path(server.authority)
    return WorkerClient(url, token, seconds, authority)


def _own_address(url: str) -> str:
    """This machine's address as the server sees it."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname is None:
        return "127.0.0.1"
    family, kind, _, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: it only chooses the interface
        return str(probe.getsockname()[0])


def read_names(model: Model) -> CheckpointNames:
    """The names and shapes of the weights, read without weights."""
    trusted = trusts(model.path, model.revision)
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=trusted)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return CheckpointNames(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted))
