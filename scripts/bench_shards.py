"""Measures what comparing a push with the ranks' shards costs, with two ranks on this machine.

    python scripts/bench_shards.py [--pushes 15] [--json FILE]

A learner of several ranks gathers its weights for a push. In pushes that compare all weights, what was
gathered is also compared with sums over the ranks' shards (``Sync.shard_sums``). Here two ranks on gloo push
to the embedded engine of each rank, float32, every weight compared; in every second push the shards are not
summed. Medians of rank 0's seconds: a push without sums, one with them, the sums alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM

from rltrain.build.engines import build_transformers_engine
from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.data.chat import StopTokens
from rltrain.learner.ranks import connect
from rltrain.learner.trained_model import TrainedModel
from rltrain.sync.colocated import Sync

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("ddp", "fsdp2")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "13M": {"vocab_size": 6000, "hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 8},
}
SUMS = "sums of the shards"
WITHOUT = "push without them"
WITH = "push with them"


def make_models(folder: Path) -> None:
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        heads = shape["hidden_size"] // 64
        config = LlamaConfig(
            **shape, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)


def launch_ranks(backend: str, folder: Path, pushes: int) -> dict[str, Any]:
    out = folder / f"{backend}.json"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    config = ["--config_file", str(ROOT / f"recipes/accelerate/{backend}.yaml")]
    ranks = [str(Path(__file__)), "--pushes", str(pushes), "--json", str(out), "--rank-of", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launch, *config, *ranks], env=environment, check=True)
    return json.loads(out.read_text())


def measure_model(path: Path, pushes: int) -> dict[str, Any]:
    """On every rank."""
    settings = Learner(optimizer=Optimizer(lr=1e-3), precision="float32")
    trained = TrainedModel(Model(path=str(path)), settings, total_updates=4, seed=0)
    engine = build_transformers_engine(
        Model(path=str(path)),
        "float32",
        StopTokens(stop=(1,), pad=0, pad_is_eos=False),
        decode=lambda token_ids: "",
        max_rows=4,
        device=trained.device,
    )
    sync = Sync([engine], trained.names.ties, sample=4, full_every=1, seed=0)
    rows = [time_pushes(trained, sync, pair) for pair in range(pushes + 2)][2:]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {
        "parameters": sum(weight.numel() for weight in trained.model.parameters()),
        "weights": len(trained.names.shapes),
        "seconds": {name: round(value, 5) for name, value in medians.items()},
        "share of the push": round(statistics.median(row[SUMS] / row[WITH] for row in rows), 3),
    }


def time_pushes(trained: TrainedModel, sync: Sync, pair: int) -> dict[str, float]:
    """A push without the sums, and one with them."""
    seconds: dict[str, float] = {}

    def sum_shards(dtype: torch.dtype) -> Any:
        start = time.perf_counter()
        fingerprints = trained.weight_fingerprints(dtype)
        seconds[SUMS] = time.perf_counter() - start
        return fingerprints

    for name, shard_sums in ((WITHOUT, None), (WITH, sum_shards)):
        with torch.no_grad():
            for parameter in trained.unwrapped_model.parameters():
                parameter += 1e-3
        sync.shard_sums = shard_sums
        trained.gather([])  # both ranks begin at once
        start = time.perf_counter()
        sync.push(trained.weights, 2 * pair + (shard_sums is not None), expect_change=True)
        seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pushes", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        connect(600)
        measured = {name: measure_model(options.rank_of / name, options.pushes) for name in SHAPES}
        if PartialState().is_main_process:
            options.json.write_text(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name))
        result: dict[str, Any] = {"pushes": options.pushes, "cores": os.cpu_count(), "ranks": 2}
        result |= {backend: launch_ranks(backend, Path(name), options.pushes) for backend in BACKENDS}
    result["load"] = round(os.getloadavg()[0], 1)  # processes that wanted a core, these two among them
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
