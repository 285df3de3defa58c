"""The state of every random generator of this process, as plain data without pickle."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rltrain.seeds import stable_hash


def seed_everything(seed: int) -> None:
    """Seed every generator with ``seed``: results of an unseeded one cannot be repeated."""
    random.seed(seed)
    np.random.seed(stable_hash(seed))  # takes 32 bits, none negative
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Python's, numpy's, torch's and, where there is one, the current CUDA device's generator, as JSON."""
    version, words, gauss = random.getstate()
    bits, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(bits), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Continue drawing where ``state`` was saved; without a CUDA device, a CUDA state is ignored."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    bits, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((bits, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
