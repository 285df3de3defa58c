"""Measures a push of all weights to a real vLLM worker on this machine, and its proof.

    python scripts/bench_push.py [--pushes 15] [--json FILE]

The model has 13 million parameters; learner and worker are two processes on a CPU, float32. Every push sends
every weight, and every second one compares every weight, as a run does; the others compare none. Beside each,
the same bytes are copied in memory. Medians.

The proof is what a push with it takes longer than the one without before it, and what the worker records in
both while it packs its layers: the same sums over the same weights, measured in this process. The parts are
told too: what the learner sums while its buckets travel, and what the worker sums when it finishes the push,
by which the end of a push with a proof is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.learner.trained_model import TrainedModel
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.flags import WorkerSettings
from rltrain.rollout.worker.process import LocalWorker
from rltrain.sync import pool, server
from rltrain.sync.pool import PoolPush
from rltrain.sync.server import WorkerLink
from rltrain.tensor_ops import Fingerprint, weight_fingerprint, weight_product

BUCKET = 16 << 20  # bytes, what a run on a CPU takes
RECORD = "recorded while packing"
# methods of a link, by the part of a push that they are; what is left are the buckets
PARTS = {"pause": "pause", "begin": "start", "finish": "finish", "resume": "resume"}
READ = "read the worker's sums"
FINISH_UNPROVED = "finish without proof"
SUMMED = "learner's fingerprints"  # while the buckets travel
TOTAL = "push and proof"
UNPROVED = "push without proof"


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6000,
        hidden_size=320,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@dataclass
class Clock:
    """Seconds of each part of the push in hand."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add_time(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return run


def measure(folder: Path, pushes: int) -> dict[str, Any]:
    settings = WorkerSettings(
        model=str(folder),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=32,
        on_gpu=False,
        kv_cache_gib=0.1,
        enforce_eager=True,
    )
    learner = Learner(optimizer=Optimizer(lr=1e-3), precision="float32")
    clock = Clock()
    for method, name in {**PARTS, "take_proof": READ}.items():
        setattr(WorkerLink, method, clock.add_time(name, getattr(WorkerLink, method)))
    trained = TrainedModel(Model(path=str(folder)), learner, total_updates=4, seed=0)
    size = sum(weight.numel() * weight.itemsize for _, weight in trained.weights())
    worker = LocalWorker(settings)
    try:
        worker.wait_until_serving()
        client = WorkerClient(worker.address.url, worker.token)
        ties = trained.names.ties
        link = WorkerLink("worker", client, torch.float32, ties, BUCKET, torch.device("cpu"))
        push = PoolPush(lambda name, control: link, torch.float32, ties, lambda value: value)
        rows = [time_pushes(trained, push, client, clock, pair, size) for pair in range(pushes + 2)][2:]
        push.close()
        client.close()
    finally:
        worker.close()
    load = round(os.getloadavg()[0], 1)  # processes that wanted a core meanwhile, these two among them
    return {"bytes": size, "pushes": pushes, "cores": os.cpu_count(), "load": load, **summarize(rows)}


def time_pushes(
    trained: TrainedModel, push: PoolPush, client: WorkerClient, clock: Clock, pair: int, size: int
) -> dict[str, float]:
    """A push without proof, one with it, and a copy of as many bytes."""
    unknown = Fingerprint(0.0, 0.0)
    with (
        patch.object(server, "new_proof", lambda: ""),  # nobody wants the worker's sums
        patch.object(pool, "weight_fingerprint", lambda name, weight: unknown),
        patch.object(WorkerLink, "take_proof", lambda link, key: []),
    ):
        unproved = time_push(trained, push, client, clock, 2 * pair)
    finish = clock.seconds[PARTS["finish"]]
    with patch.object(pool, "weight_fingerprint", clock.add_time(SUMMED, weight_fingerprint)):
        total = time_push(trained, push, client, clock, 2 * pair + 1)
    source = torch.empty(size, dtype=torch.uint8)
    target = torch.empty(size, dtype=torch.uint8)
    target.copy_(source)
    start = time.perf_counter()
    target.copy_(source)
    copy = time.perf_counter() - start
    others = {RECORD: time_record(trained), UNPROVED: unproved, FINISH_UNPROVED: finish, "memcpy": copy}
    return {**clock.seconds, TOTAL: total, **others}


def time_push(
    trained: TrainedModel, push: PoolPush, client: WorkerClient, clock: Clock, version: int
) -> float:
    """Seconds of a push of weights that have all moved; the clock has its parts."""
    with torch.no_grad():
        for parameter in trained.unwrapped_model.parameters():
            parameter += 1e-3
    clock.seconds.clear()
    start = time.perf_counter()
    served, lost, quarantined = push.push({"worker": client}, trained.weights(torch.float32), version)
    total = time.perf_counter() - start
    assert served == ("worker",), (lost, quarantined)
    return total


def time_record(trained: TrainedModel) -> float:
    """Seconds of the products of all matrices but the embedding, which no layer packs."""
    matrices = {name: weight for name, weight in trained.weights() if weight.ndim == 2}
    packed = {name: weight for name, weight in matrices.items() if "embed_tokens" not in name}
    start = time.perf_counter()
    for name, weight in packed.items():
        weight_product(name, weight)
    return time.perf_counter() - start


def summarize(rows: list[dict[str, float]]) -> Mapping[str, Any]:
    seconds = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    seconds["buckets"] = seconds[TOTAL] - sum(seconds[name] for name in (*PARTS.values(), READ))
    shares = [(row[TOTAL] - row[UNPROVED] + row[RECORD]) / row[TOTAL] for row in rows]
    return {
        "seconds": {name: round(value, 4) for name, value in sorted(seconds.items())},
        "proof share": round(statistics.median(shares), 3),
        "times a memcpy": round(seconds[TOTAL] / seconds["memcpy"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pushes", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        result = measure(Path(folder) / "model", options.pushes)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
