"""Builds the engine that samples on several vLLM servers: started here, named by their urls, or joining."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rltrain.build.server import (
    connect,
    find_token,
    free_devices,
    make_link,
    make_served_model,
    read_names,
    visible_devices,
)
from rltrain.config.schema import Data, Model, Rollout, Workers
from rltrain.data.tokenization import Tokenization
from rltrain.errors import UserError
from rltrain.process import Process
from rltrain.rollout.engines.vllm_pool import VllmPool
from rltrain.rollout.engines.vllm_server import require_settings
from rltrain.rollout.pool.door import Door
from rltrain.rollout.pool.homes import Connector, LocalHome, RemoteHome
from rltrain.rollout.pool.members import Home
from rltrain.rollout.pool.pool import NOWHERE, PoolRules, WorkerPool
from rltrain.rollout.pool.routed import RoutedPool
from rltrain.rollout.worker.flags import WorkerSettings, require_known_version, worker_settings
from rltrain.rollout.worker.threads import LoopThread
from rltrain.sync.adapter_server import AdapterPoolPush
from rltrain.sync.pool import PoolPush
from rltrain.timeline import Timeline
from rltrain.weight_names import CheckpointNames

__all__ = [
    "ALIVE_SHARE",
    "attach_pool",
    "build_pool_engine",
    "find_homes",
    "make_connector",
    "make_pusher",
    "open_pool",
]

# Of rollout.server.liveness_seconds: the deadline of a sign of life. The rest is the pause before the next,
# so that a worker which hangs is noticed after twice that key.
ALIVE_SHARE = 0.8


def build_pool_engine(
    model: Model,
    data: Data,
    rollout: Rollout,
    precision: str,
    tokenization: Tokenization,
    process: Process,
) -> VllmPool:
    """The engine on every rank, without weights; when this returns, every worker has answered or failed once.

    Raises UserError where no worker can be used, and where ranks would sample at different times.
    """
    assert rollout.workers is not None
    _require_together(rollout, process)
    settings = worker_settings(model, data, rollout, precision, on_gpu=process.device.type == "cuda")
    homes: dict[str, Home] = {}
    connector = make_connector(rollout, settings)
    if process.is_main:
        homes = find_homes(rollout, settings, connector)
    return attach_pool(homes, connector, settings, model, rollout, tokenization, process)


def attach_pool(
    homes: Mapping[str, Home],
    connector: Connector,
    settings: WorkerSettings,
    model: Model,
    rollout: Rollout,
    tokenization: Tokenization,
    process: Process,
) -> VllmPool:
    """homes: of the workers, on rank 0."""
    assert rollout.workers is not None
    names = read_names(model)
    served = make_served_model(names, tokenization, settings.max_model_len)
    dtype = getattr(torch, settings.dtype)
    pusher = make_pusher(names, dtype, process, rollout.server.bucket_mib)
    make = partial(
        VllmPool,
        model=served,
        pusher=pusher,
        adapters=None if model.adapter is None else AdapterPoolPush(pusher.make_link, dtype),
        dtype=dtype,
        rank=process.rank,
        world_size=process.world_size,
        gather=process.gather,
    )
    if not process.is_main:
        return make(None, None)
    pool, loop, close = open_pool(homes, connector, rollout, served.vocabulary)
    return make(pool, loop, at_close=close)


def open_pool(
    homes: Mapping[str, Home],
    connector: Connector,
    rollout: Rollout,
    vocabulary: int,
    timeline: Timeline = NOWHERE,
) -> tuple[WorkerPool, LoopThread, Callable[[], None]]:
    """The pool, its event loop, and what must be called before the pool is closed.

    Every worker has answered or failed once. Raises UserError where none can be used.
    """
    workers = rollout.workers
    assert workers is not None
    alive = rollout.server.liveness_seconds * (1 - ALIVE_SHARE)
    update = "refuse" if rollout.bound is None else rollout.bound.update
    rules = PoolRules(vocabulary, workers.patience_seconds, alive, update=update)
    loop = LoopThread()
    pool = _make_pool(homes, rules, workers, connector, timeline)
    close: Callable[[], None] = _do_nothing
    try:
        loop.run(pool.start()).result()
        if workers.join:
            close = _open_door(rollout, pool, loop, connector).close
        loop.run(pool.wait_for_workers(workers.patience_seconds)).result()
    except BaseException:
        close()
        loop.run(pool.close()).result()
        loop.close()
        raise
    return pool, loop, close


def _make_pool(
    homes: Mapping[str, Home],
    rules: PoolRules,
    workers: Workers,
    connector: Connector,
    timeline: Timeline,
) -> WorkerPool:
    if workers.router is None:
        return WorkerPool(homes, rules, timeline=timeline)
    client = connector.connect(workers.router, find_token("rollout.workers.router"))
    return RoutedPool(homes, rules, workers.router, client, warnings.warn, timeline)


def make_connector(rollout: Rollout, settings: WorkerSettings) -> Connector:
    server = rollout.server
    quick = server.model_copy(update={"liveness_seconds": server.liveness_seconds * ALIVE_SHARE})
    return Connector(
        lambda url, token: connect(url, token, quick), lambda info, url: require_settings(info, settings, url)
    )


def find_homes(rollout: Rollout, settings: WorkerSettings, connector: Connector) -> dict[str, Home]:
    """The workers that the recipe names, by name."""
    workers = rollout.workers
    assert workers is not None
    if workers.count is None:
        urls = (*workers.urls, *workers.admin)
        token = find_token("rollout.workers") if urls or workers.join else ""
        return {f"worker {url}": RemoteHome(url, token, connector) for url in urls}
    require_known_version()
    # on one CPU, starts at the same time only slow each other down
    gate = None if settings.on_gpu else threading.Lock()
    silence = rollout.server.silence_seconds
    return {
        f"worker {place}": LocalHome(each, connector, silence, gate)
        for place, each in enumerate(_divide_devices(settings, workers.count))
    }


def _divide_devices(settings: WorkerSettings, count: int) -> list[WorkerSettings]:
    """The settings of each local worker; on GPUs, each has its own."""
    if not settings.on_gpu:
        return [settings] * count
    needed = settings.tensor_parallel * settings.data_parallel
    learners = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = free_devices(visible_devices(), learners, needed * count)
    return [
        replace(settings, devices=devices[place * needed : (place + 1) * needed]) for place in range(count)
    ]


def make_pusher(
    names: CheckpointNames, dtype: torch.dtype, process: Process, bucket_mib: int | None
) -> PoolPush:
    def share(value: Any) -> Any:
        return process.gather([value] if process.is_main else [])[0]

    def link(name: str, control: Any) -> Any:
        return make_link(name, control, dtype, names, process, bucket_mib)

    return PoolPush(link, dtype, names.ties, share, process.is_main)


def _open_door(rollout: Rollout, pool: WorkerPool, loop: LoopThread, connector: Connector) -> Door:
    workers = rollout.workers
    assert workers is not None
    token = find_token("rollout.workers.join")

    def welcome(url: str) -> None:
        loop.run(pool.add(f"worker {url}", RemoteHome(url, token, connector))).result()

    return Door(workers.host, workers.port, token, welcome)


def _require_together(rollout: Rollout, process: Process) -> None:
    """Raises UserError for what has ranks sample at different times: a push in between is a collective."""
    for key, value in (("environment", rollout.environment), ("extra_samples", rollout.extra_samples)):
        if value and process.world_size > 1:
            raise UserError(
                f"rollout.workers and rollout.{key} need one rank, and there are {process.world_size}: ranks "
                "would ask the pool at different times; start one rank, or set rollout.workers to null"
            )


def _do_nothing() -> None: ...
