"""What the output head moves on a GPU: bytes, FLOP and kernels, counted without one.

    python scripts/head_traffic.py [--compiled]

The head's own code runs on meta tensors, which hold no memory; every operation counts its inputs as read once
and its outputs as written once. The time is a roofline: each kernel is bound by 600e12 FLOP/s or 3.0e12
bytes/s. ``--compiled`` adds the head with its compiled functions: their bytes per logit are those that
PyTorch's compiler plans, on a CPU, for the same functions.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rltrain.learner import compiled_tiles, head

FLOP_RATE = 600e12
BYTE_RATE = 3.0e12
TOKENS = 16384
SHAPES = {"1.5B": (1536, 151936), "7B": (3584, 152064), "32B": (5120, 152064)}
CHUNKS = (256, 1024, 2048, 4096)
# operations that return a view, or make a tensor without writing it
_FREE = frozenset(
    [
        "view",
        "t",
        "slice",
        "select",
        "transpose",
        "detach",
        "empty",
        "alias",
        "unsqueeze",
        "squeeze",
        "as_strided",
        "expand",
        "split",
        "empty_like",
        "new_empty",
        "permute",
        "reshape",
        "_unsafe_view",
        "unbind",
        "empty_strided",
    ]
)
_WRITES_ONLY = frozenset({"zero_", "zeros_like", "zeros", "fill_"})


class Traffic(TorchDispatchMode):
    """Inside: bytes, FLOP, kernels and seconds of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.flop = 0
        self.kernels = 0
        self.seconds = 0.0
        self.by_name: Counter[str] = Counter()

    def add(self, name: str, size: int, flop: int) -> None:
        self.bytes += size
        self.flop += flop
        self.kernels += 1
        self.seconds += max(size / BYTE_RATE, flop / FLOP_RATE)
        self.by_name[name] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in _FREE or (name == "copy_" and is_same_memory(*args[:2])):
            return out
        outputs = tensor_bytes(out)
        inputs = tensor_bytes((args, {key: value for key, value in kwargs.items() if key != "out"}))
        size = outputs if name in _WRITES_ONLY else inputs + outputs
        self.add(name, size, product_flop(name, args))
        return out


def is_same_memory(target: Tensor, source: Tensor) -> bool:
    """Whether a copy is onto itself, which CUDA leaves out."""
    return target.untyped_storage()._cdata == source.untyped_storage()._cdata


def tensor_bytes(values: Any) -> int:
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def product_flop(name: str, arguments: tuple[Any, ...]) -> int:
    if name not in ("mm", "addmm", "addmm_"):
        return 0
    left, right = arguments[:2] if name == "mm" else arguments[1:3]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def count_head(
    hidden: int,
    vocabulary: int,
    tokens: int,
    chunk: int,
    *,
    wants: frozenset[str] = frozenset({"logp", "entropy"}),
    compiled: bool = False,
) -> tuple[Traffic, Traffic]:
    """(forward, backward) of the head in bfloat16. compiled: its tile functions count as one kernel each."""
    meta = {"device": "meta", "dtype": torch.bfloat16}
    states = torch.empty(tokens, hidden, **meta, requires_grad=True)
    weight = torch.empty(vocabulary, hidden, **meta, requires_grad=True)
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    forward = Traffic()
    backward = Traffic()
    with _without_autocast(), _count_compiled(compiled, forward, backward):
        with forward:
            values = head.token_statistics(states, weight, targets, temperature=1.0, wants=wants, chunk=chunk)
        with backward:
            values["logp"].sum().backward()
    return forward, backward


@contextmanager
def _without_autocast() -> Iterator[None]:
    """The head switches autocast off, which the meta device does not know."""
    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda kind: False),
        mock.patch.object(torch, "autocast", mock.MagicMock()),
    ):
        yield


@contextmanager
def _count_compiled(compiled: bool, forward: Traffic, backward: Traffic) -> Iterator[None]:
    """In place of each compiled function, count one kernel with the bytes that the compiler plans for it."""
    if not compiled:
        yield
        return
    passes = planned_passes()

    def softmax_numbers(z: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        forward.add("softmax_numbers", round(passes["forward"] * z.numel()), 0)
        return tuple(torch.empty(3, z.shape[0], device="meta"))

    def logits_gradient(z: Tensor, *arguments: Any) -> None:
        backward.add("logits_gradient", round(passes["backward"] * z.numel()), 0)

    with (
        mock.patch.object(compiled_tiles, "serve", lambda device: True),
        mock.patch.object(compiled_tiles, "softmax_numbers", softmax_numbers),
        mock.patch.object(compiled_tiles, "logits_gradient", logits_gradient),
    ):
        yield


@cache
def planned_passes(rows: int = 8, vocabulary: int = 16384) -> dict[str, float]:
    """Bytes per bfloat16 logit of the compiled functions, as PyTorch's compiler plans their kernels.

    A kernel that reads the logits twice, for a maximum and a sum, counts them once in the compiler's plan and
    twice here: two rows of logits do not stay in a GPU's cache.
    """
    from torch._inductor import metrics

    logger = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    level = logger.level
    logits = torch.randn(rows, vocabulary).bfloat16()
    targets = torch.arange(rows)
    vector = torch.ones(rows)
    passes: dict[str, float] = {}
    torch.compiler.reset()
    logger.setLevel(logging.INFO)
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            for name in ("forward", "backward"):
                metrics.reset()
                if name == "forward":
                    compiled_tiles.softmax_numbers(logits, targets, 1.0, torch.float32, entropy=True)
                else:
                    compiled_tiles.logits_gradient(logits, targets, vector, vector, vector, None, 1.0)
                reads = 2 * logits.numel() if name == "forward" else 0  # the second reading
                passes[name] = (metrics.num_bytes_accessed + reads) / logits.numel()
    finally:
        logger.setLevel(level)
    return passes


def print_table(*, compiled: bool) -> None:
    print(f"{TOKENS:,} tokens, bfloat16; log-prob and entropy, gradients of hidden states and weight\n")
    print("| model | chunk | form | GB forward | GB backward | kernels | ms, roofline | products alone, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for model, (hidden, vocabulary) in SHAPES.items():
        for chunk in CHUNKS:
            for form in (False, True) if compiled else (False,):
                forward, backward = count_head(hidden, vocabulary, TOKENS, chunk, compiled=form)
                kernels = forward.kernels + backward.kernels
                seconds = forward.seconds + backward.seconds
                products = (forward.flop + backward.flop) / FLOP_RATE
                name = "compiled" if form else "eager"
                sizes = f"{forward.bytes / 1e9:.0f} | {backward.bytes / 1e9:.0f} | {kernels:,}"
                times = f"{1e3 * seconds:.0f} | {1e3 * products:.0f}"
                print(f"| {model} | {chunk:,} | {name} | {sizes} | {times} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="also the compiled form; compiles on the CPU")
    print_table(compiled=parser.parse_args().compiled)
