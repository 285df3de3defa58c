"""Measures a push of all weights to a real vLLM worker on this machine, and its proof.

    python scripts/bench_push.py [--pushes 9] [--json FILE]

The model has 12 million parameters; learner and worker are two processes on a CPU, float32. Every push sends
every weight and compares every weight. Beside each, the same bytes are copied in memory. Medians.

The proof is the time from the end of the last bucket to the end of the comparison, in which both sides read
their weights at once, and what the worker records while it packs its layers: the same sums over the same
weights, measured in this process.
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

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.learner.trained_model import TrainedModel
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.flags import WorkerSettings
from rltrain.rollout.worker.process import LocalWorker
from rltrain.sync.server import ServerSync, WorkerLink
from rltrain.tensor_ops import weight_product

BUCKET = 16 << 20  # bytes, what a run on a CPU takes
RECORD = "recorded while packing"
# methods of a link, by the part of a push that they are; what is left are the buckets
PARTS = {"pause": "pause", "begin": "start", "finish": "finish", "resume": "resume"}
SIDES = ("learner's fingerprints", "worker's fingerprints")  # at once, within the proof


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
    """Seconds of each part of the push in hand, and when each ended last."""

    seconds: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)

    def add_time(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            self.ends[name] = time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + self.ends[name] - start
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
    for method, name in {**PARTS, "read": SIDES[1], "prove": "compare"}.items():
        setattr(WorkerLink, method, clock.add_time(name, getattr(WorkerLink, method)))
    trained = TrainedModel(Model(path=str(folder)), learner, total_updates=4, seed=0)
    size = sum(weight.numel() * weight.itemsize for _, weight in trained.weights())
    worker = LocalWorker(settings)
    try:
        worker.wait_until_serving()
        client = WorkerClient(worker.address.url, worker.token)
        link = WorkerLink("worker", client, torch.float32, trained.names.ties, BUCKET, torch.device("cpu"))
        rows = [time_push(trained, link, clock, version, size) for version in range(pushes + 2)][2:]
        link.close()
        client.close()
    finally:
        worker.close()
    load = round(os.getloadavg()[0], 1)  # processes that wanted a core meanwhile, these two among them
    return {"bytes": size, "pushes": pushes, "cores": os.cpu_count(), "load": load, **summarize(rows)}


def time_push(
    trained: TrainedModel, link: WorkerLink, clock: Clock, version: int, size: int
) -> dict[str, float]:
    """Moves every weight, pushes, and copies as many bytes."""
    with torch.no_grad():
        for parameter in trained.unwrapped_model.parameters():
            parameter += 1e-3
    clock.seconds.clear()
    fingerprints = clock.add_time(SIDES[0], trained.weight_fingerprints)
    sync = ServerSync([link], torch.float32, trained.broadcast, fingerprints)
    start = time.perf_counter()
    report = sync.push(trained.weights, version)
    total = time.perf_counter() - start
    assert report.served == ("worker",), (report.lost, report.quarantined)
    source = torch.empty(size, dtype=torch.uint8)
    target = torch.empty(size, dtype=torch.uint8)
    target.copy_(source)
    start = time.perf_counter()
    target.copy_(source)
    copy = time.perf_counter() - start
    record = time_record(trained)
    proof = clock.ends["compare"] - clock.ends["finish"]
    return {**clock.seconds, "proof": proof, RECORD: record, "push and proof": total, "memcpy": copy}


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
    others = sum(seconds[name] for name in (*PARTS.values(), "proof"))
    seconds["buckets"] = seconds["push and proof"] - others
    proof = seconds["proof"] + seconds[RECORD]
    return {
        "seconds": {name: round(value, 4) for name, value in sorted(seconds.items())},
        "proof share": round(proof / seconds["push and proof"], 3),
        "times a memcpy": round(seconds["push and proof"] / seconds["memcpy"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pushes", type=int, default=9)
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
