"""What a pool of workers costs the process that asks them, and how soon a lost worker is noticed.

    python scripts/bench_server.py [--json FILE] [--completions N] [--in-flight N] [--liveness S]

The workers are processes that answer requests of rltrain's own route with fixed completions of 64 tokens, so
that everything measured is the pool's: routing, HTTP, and the checks of every answer. One JSON object:

completions_per_s, completions_per_cpu_s: answered, per second of the clock and of this process's CPU time.
in_flight, peak_mib: completions under way at once, and this process's largest memory until they were there.
bytes_per_token: of an answer on its way.
kill_to_redispatch_s: from SIGKILL of a worker until its requests are with another.
stop_to_redispatch_s: the same from SIGSTOP, with the default deadlines of a sign of life.

``bench_controller.py`` measures the whole controller: drawing, sampling, grading, and the way to rank 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rltrain.rollout.pool.members import Member, MemberState
from rltrain.rollout.pool.pool import PoolRules, WorkerPool
from rltrain.rollout.worker.answers import GenerateRequest
from rltrain.rollout.worker.client import Seconds, WorkerClient
from rltrain.rollout.worker.guard import GENERATE, INFO, Choice, encode_answer

TOKENS = 64
GROUP = 8
VOCABULARY = 50_000
WORKERS = 2
IDS = tuple(range(100, 100 + TOKENS))
CALL_SHARE = 0.8  # of it, for the call


@dataclass
class Canned:
    """A worker that answers at once, or holds all answers back until it is told to let them go.

    rows: as many as it says that it samples at once. ids: the tokens of every answer.
    """

    rows: int
    ids: Sequence[int]
    held: bool = False
    waiting: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [
                    int(line.partition(b":")[2])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                ]
                length = lengths[0] if lengths else 0  # a GET has none
                body = await reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            answer = await self.answer(head.split(b" ", 2)[1].decode(), body)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
            await writer.drain()

    async def answer(self, path: str, body: bytes) -> bytes:
        if path != GENERATE:
            known = {"/server_info": describe_server(self.rows), "/version": {"version": "0.32.0"}}
            return json.dumps(
                known.get(path.partition("?")[0], {"rltrain": 1} if path == INFO else {})
            ).encode()
        request = json.loads(body)
        count = request["sampling_params"]["n"]
        self.waiting += count
        if self.held:
            await self.free.wait()
        self.waiting -= count
        return encode_answer(request["request_id"], make_choices(count, self.ids))

    async def obey(self, pipe: Connection) -> None:
        """Answers questions of the parent; ends with it."""
        while True:
            while not pipe.poll():
                await asyncio.sleep(0.005)
            order = pipe.recv()
            if order == "hold":
                self.held = True
                self.free.clear()
            if order == "free":
                self.held = False
                self.free.set()
            pipe.send(self.waiting)


def describe_server(rows: int) -> dict[str, Any]:
    model = {"dtype": "float32", "max_model_len": 4096, "logprobs_mode": "processed_logprobs", "seed": 0}
    parallel = {"tensor_parallel_size": 1, "data_parallel_size": 1}
    parts = {
        "model_config": {**model, "quantization": None},
        "parallel_config": parallel,
        "scheduler_config": {"max_num_seqs": rows},
    }
    return {"vllm_config": parts}


def make_choices(count: int, ids: Sequence[int]) -> list[Choice]:
    logprobs = [-1.0] * TOKENS
    return [Choice(place, list(ids), logprobs, "length", None, [("0", 0, TOKENS)]) for place in range(count)]


def serve(path: str, pipe: Connection, rows: int, ids: Sequence[int]) -> None:
    async def run() -> None:
        canned = Canned(rows, ids)
        server = await asyncio.start_unix_server(canned.serve, path, backlog=4096)
        pipe.send("serving")
        async with server:
            await canned.obey(pipe)

    asyncio.run(run())


class CannedHome:
    """Implements ``Home`` with such a process; a lost one does not come back."""

    is_local = False

    def __init__(self, path: Path, rows: int, liveness: float = 5.0, ids: Sequence[int] = IDS) -> None:
        self.rows = rows
        self._liveness = liveness
        self.path = path
        self._was_opened = False
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(str(path), end, rows, ids), daemon=True)
        self.process.start()
        self.pipe.recv()

    def open(self) -> tuple[WorkerClient, int]:
        if self._was_opened:
            raise OSError("it was lost")
        self._was_opened = True
        seconds = Seconds(alive=self._liveness * CALL_SHARE)
        return WorkerClient(f"unix:{self.path}", "token", seconds, is_guarded=True), self.rows

    def ask(self, order: str) -> int:
        self.pipe.send(order)
        return int(self.pipe.recv())

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def require_process(self) -> None: ...

    def close(self) -> None:
        self.process.kill()
        self.process.join()


class Bench:
    """A pool of canned workers that hold version 0."""

    def __init__(self, folder: Path, rows: int, liveness: float = 5.0) -> None:
        self.homes = {
            f"worker {place}": CannedHome(folder / f"{place}", rows, liveness) for place in range(WORKERS)
        }
        rules = PoolRules(VOCABULARY, patience=60.0, alive=liveness * (1 - CALL_SHARE), retry=60.0)
        self.pool = WorkerPool(self.homes, rules, lambda line: None)

    async def start(self) -> None:
        await self.pool.start()
        await self.pool.wait_for_workers(60.0)
        names = await self.pool.begin_push()
        await self.pool.end_push(0, list(names), {}, {})

    async def sample(self, groups: int) -> None:
        arrivals: asyncio.Queue[Any] = asyncio.Queue()
        asked = [(f"p{place}", make_request(place)) for place in range(groups)]
        await self.pool.submit(asked, 0, arrivals.put_nowait)
        for _ in range(groups):
            arrival = await arrivals.get()
            if isinstance(arrival, BaseException):
                raise arrival


def make_request(place: int) -> GenerateRequest:
    return GenerateRequest(
        id="",
        token_ids=list(range(1, 101)),
        n=GROUP,
        temperature=1.0,
        max_tokens=TOKENS,
        seed=place * GROUP,
        stop_token_ids=[0],
        salt="0 ",
        model="policy",
    )


async def measure_rate(folder: Path, completions: int) -> dict[str, float]:
    bench = Bench(folder, rows=512)
    await bench.start()
    await bench.sample(64)  # connections are open
    start = time.perf_counter()
    cpu_start = time.process_time()
    await bench.sample(completions // GROUP)
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    await bench.pool.close()
    counts = bench.pool.counts
    assert counts.asked == counts.answered
    return {"completions_per_s": completions / seconds, "completions_per_cpu_s": completions / cpu_seconds}


async def measure_in_flight(folder: Path, completions: int) -> dict[str, float]:
    bench = Bench(folder, rows=completions // WORKERS)
    await bench.start()
    for home in bench.homes.values():
        home.ask("hold")
    sampling = asyncio.create_task(bench.sample(completions // GROUP))
    under_way = 0
    while under_way < completions and not sampling.done():
        await asyncio.sleep(0.05)
        under_way = sum([await asyncio.to_thread(home.ask, "count") for home in bench.homes.values()])
    for home in bench.homes.values():
        home.ask("free")
    await sampling
    await bench.pool.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"in_flight": float(under_way), "peak_mib": peak}


async def measure_loss(folder: Path, number: signal.Signals, liveness: float) -> float:
    """Seconds from the signal until the worker's requests are with the other."""
    bench = Bench(folder, rows=128, liveness=liveness)
    await bench.start()
    for home in bench.homes.values():
        home.ask("hold")
    sampling = asyncio.create_task(bench.sample(2 * 64 // GROUP))
    doomed, other = bench.pool.members.values()
    while not doomed.leases:
        await asyncio.sleep(0.005)
    requests = len(doomed.leases) + len(other.leases)
    start = time.perf_counter()
    bench.homes[doomed.name].signal(number)
    while doomed.state is MemberState.SERVING or not _has_all(other, requests):
        await asyncio.sleep(0.001)
    seconds = time.perf_counter() - start
    bench.homes[other.name].ask("free")
    await sampling
    await bench.pool.close()
    return seconds


def _has_all(member: Member, requests: int) -> bool:
    return len(member.leases) == requests


def bytes_per_token() -> float:
    return len(encode_answer("rltrain-00000000-1", make_choices(GROUP, IDS))) / (GROUP * TOKENS)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--completions", type=int, default=40_000, metavar="N")
    parser.add_argument("--in-flight", type=int, default=10_000, metavar="N")
    parser.add_argument(
        "--liveness", type=float, default=5.0, metavar="S", help="rollout.server.liveness_seconds"
    )
    chosen = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    results: dict[str, Any] = {"machine": platform.platform(), "cpus": os.cpu_count(), "files": [soft, hard]}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folders = [Path(name) / part for part in ("rate", "flight", "kill", "stop")]
        for folder in folders:
            folder.mkdir()
        results |= asyncio.run(measure_rate(folders[0], chosen.completions))
        results |= asyncio.run(measure_in_flight(folders[1], chosen.in_flight))
        results["bytes_per_token"] = bytes_per_token()
        results["kill_to_redispatch_s"] = asyncio.run(
            measure_loss(folders[2], signal.SIGKILL, chosen.liveness)
        )
        results["stop_to_redispatch_s"] = asyncio.run(
            measure_loss(folders[3], signal.SIGSTOP, chosen.liveness)
        )
    rounded = {key: round(each, 3) if isinstance(each, float) else each for key, each in results.items()}
    text = json.dumps(rounded, indent=1)
    print(text)
    if chosen.json is not None:
        chosen.json.write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
