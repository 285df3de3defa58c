"""Compares the chunked output head with the naive form: log-prob and entropy of every token, forward and
backward, with gradients of both inputs.

naive: all logits at once, log_softmax, gather and entropy, autograd. ours:
``rltrain.learner.head.token_statistics`` at several chunk sizes. Every measurement runs in a separate
process. Time is the wall-clock time of one forward and backward pass after a small warm-up. Memory is the
growth of the process's peak resident set (``ru_maxrss``; on a GPU ``max_memory_allocated``) over its size
before the call; it includes both gradients but not the inputs. Repeats alternate; the table shows medians.

Both ratios are ours / naive, so smaller is better: memory_ratio (target: at most 1/12 = 0.083), time_ratio
(target: at most 1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rltrain.learner.head import token_statistics

CHUNKS = (64, 128, 256, 512, 1024)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp_all = (hidden @ weight.t()).float().log_softmax(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    return logp_all.gather(1, targets[:, None]).squeeze(1), entropy


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    values = token_statistics(
        hidden, weight, targets, temperature=1.0, wants=frozenset({"logp", "entropy_grad"}), chunk=chunk
    )
    return values["logp"], values["entropy"]


def step(inputs: tuple[Tensor, Tensor, Tensor], chunk: int) -> None:
    """One forward and backward pass; chunk 0 is the naive form."""
    logp, entropy = naive(*inputs) if chunk == 0 else ours(*inputs, chunk)
    (logp.sum() + 0.01 * entropy.sum()).backward()


def make_inputs(
    tokens: int, hidden: int, vocab: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device, dtype=dtype) * hidden**-0.5).requires_grad_()
    return states, weight, torch.randint(vocab, (tokens,), device=device)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of one step, in this process."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    on_gpu = options.device == "cuda"
    # warm-up of threads, libraries and kernels
    step(make_inputs(8, options.hidden, 64, options.device, dtype), options.measure)

    inputs = make_inputs(options.tokens, options.hidden, options.vocab, options.device, dtype)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_bytes()

    start = time.perf_counter()
    step(inputs, options.measure)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": peak - before}


def resident_bytes() -> int:
    """Current resident set of this process; ru_maxrss would hide growth that stays below an earlier peak."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_in_process(options: argparse.Namespace, device: str, dtype: str, chunk: int) -> dict[str, float]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "hidden", "vocab", "threads")]
    command = [
        sys.executable,
        __file__,
        "--measure",
        str(chunk),
        "--device",
        device,
        "--dtype",
        dtype,
        *sizes,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise SystemExit(
            f"the measurement of chunk {chunk} on {device} {dtype} ended with {process.returncode} "
            f"(memory?):\n{process.stderr[-2000:]}"
        )
    return json.loads(process.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, device: str, dtype: str) -> dict[str, dict[str, float]]:
    """Medians over alternating repeats and the two ratios, by chunk size (medians also of "naive")."""
    samples_by_chunk: dict[int, list[dict[str, float]]] = {chunk: [] for chunk in (0, *options.chunks)}
    for _ in range(options.repeats):
        for chunk, samples in samples_by_chunk.items():
            samples.append(measure_in_process(options, device, dtype, chunk))
    names = {chunk: str(chunk) if chunk else "naive" for chunk in samples_by_chunk}
    medians: dict[str, dict[str, float]] = {"seconds": {}, "bytes": {}}
    for key, by_chunk in medians.items():
        for chunk, samples in samples_by_chunk.items():
            by_chunk[names[chunk]] = statistics.median(sample[key] for sample in samples)
    ratios = {
        f"{label}_ratio": {
            str(chunk): medians[key][str(chunk)] / medians[key]["naive"] for chunk in options.chunks
        }
        for label, key in (("memory", "bytes"), ("time", "seconds"))
    }
    return {**ratios, **medians}


def show(name: str, options: argparse.Namespace, numbers: dict[str, dict[str, float]]) -> None:
    sizes = f"{options.tokens} tokens, hidden {options.hidden}, V = {options.vocab}"
    table = Table(title=f"{name}: {sizes}, median of {options.repeats}")
    for column in ("chunk", "seconds", "GB", "time / naive", "memory / naive"):
        table.add_column(column, justify="right")
    for chunk, seconds in numbers["seconds"].items():
        ratios = [
            f"{numbers[key][chunk]:.3f}" if chunk in numbers[key] else "1"
            for key in ("time_ratio", "memory_ratio")
        ]
        table.add_row(chunk, f"{seconds:.2f}", f"{numbers['bytes'][chunk] / 1e9:.3f}", *ratios)
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write ratios, medians, versions and machine here")
    # one measurement in this process, for this chunk size
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return
    settings = [("cpu", "float32")] + (
        [("cuda", "float32"), ("cuda", "bfloat16")] if torch.cuda.is_available() else []
    )
    results = {f"{device} {dtype}": compare(options, device, dtype) for device, dtype in settings}
    for name, numbers in results.items():
        show(name, options, numbers)
    if options.json is not None:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "threads": options.threads,
            "system": platform.platform(),
        }
        if torch.cuda.is_available():
            machine["gpu"] = torch.cuda.get_device_name()
        sizes = {name: getattr(options, name) for name in ("tokens", "hidden", "vocab", "repeats")}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        others = {name: numbers for name, numbers in results.items() if name != "cpu float32"}
        report = {
            **results["cpu float32"],
            **others,
            "sizes": sizes,
            "versions": versions,
            "machine": machine,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
