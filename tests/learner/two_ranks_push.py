"""One rank of ``test_push_to_worker.py``: pushes to a worker after an update, and measures what a push holds.

accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 two_ranks_push.py MODEL OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.learner.packing import build
from rltrain.learner.ranks import connect
from rltrain.learner.trained_model import TrainedModel
from rltrain.sync.server import ServerSync, WorkerLink
from rltrain.sync.transport import Pace
from rltrain.tensor_ops import weight_fingerprint
from rltrain.types.policy import TokenRows
from support.fake_worker import FakeWorker

CAPACITY = 1 << 22  # bytes


class Peak(TorchDispatchMode):
    """The most bytes of storages that are alive at once, of those that this thread makes inside the block.

    Storages are counted when an operation has run, not in between: what a kernel takes for itself is no
    tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {storage_of(tensor) for tensor in tree_leaves((args, kwargs)) if is_plain(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if is_plain(tensor) and storage_of(tensor) not in inputs:
                storage = tensor.untyped_storage()
                self._made[storage_of(tensor)] = storage._weak_ref(), storage.nbytes()
        self._made = {
            key: made for key, made in self._made.items() if not torch.UntypedStorage._expired(made[0])
        }
        self.bytes = max(self.bytes, sum(size for _, size in self._made.values()))
        return result


def is_plain(tensor: object) -> bool:
    return type(tensor) is Tensor or isinstance(tensor, torch.nn.Parameter)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def main(model: str, out: Path, precision: str) -> None:
    connect(120)
    settings = Learner(optimizer=Optimizer(lr=1e-3), precision=precision)
    trained = TrainedModel(Model(path=model), settings, total_updates=4, seed=0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    worker = FakeWorker(ties=trained.names.ties) if trained.rank == 0 else None
    pace = Pace(seconds=20.0)
    cpu = torch.device("cpu")
    links = (
        [WorkerLink("worker", worker.connect(), dtype, trained.names.ties, CAPACITY, cpu, pace=pace)]
        if worker is not None
        else []
    )
    sync = ServerSync(links, dtype, trained.broadcast, trained.weight_fingerprints)
    sync.push(trained.weights, 0)
    update(trained)
    with Peak() as peak:
        report = sync.push(trained.weights, 1)
    full = {name: weight.to(dtype) for name, weight in trained.weights()}
    shards = trained.weight_fingerprints(dtype)
    result = {
        "served": report.served,
        "lost": {name: str(error) for name, error in report.lost.items()},
        "quarantined": {name: str(error) for name, error in report.quarantined.items()},
        "checked": report.checked,
        "peak": peak.bytes,
        "largest": max(weight.numel() * weight.itemsize for weight in full.values()),
        "total": sum(weight.numel() * weight.itemsize for weight in full.values()),
        "worst": max(difference(name, weight, shards[name].number) for name, weight in full.items()),
        "differing": [] if worker is None else compare(worker, full),
    }
    (out / f"rank-{trained.rank}.json").write_text(json.dumps(result))
    if trained.rank == 0:
        torch.save(full, out / "weights.pt")
    if worker is not None:
        worker.close()


def difference(name: str, weight: Tensor, number: float) -> float:
    expected = weight_fingerprint(name, weight).number
    return abs(number - expected) / max(abs(expected), 1e-30)


def compare(worker: FakeWorker, full: dict[str, Tensor]) -> list[str]:
    """Names of weights that the worker does not hold to the bit."""
    return [name for name, held in worker.weights().items() if not torch.equal(held, full[name].float())]


def update(trained: TrainedModel) -> None:
    """One step towards larger log-probs of a row."""
    rows = TokenRows(((5, 6),), ((7, 8, 9),))
    micro_batch = build(rows, [0], layout=trained.layout, device=trained.device)
    with trained.backend.micro_batch(last=True):
        share = 1.0 if trained.rank == 0 else 0.0
        logp = trained.forward(micro_batch, temperature=1.0, wants=frozenset({"logp"}))["logp"]
        trained.backend.backward(-logp.sum() * share * trained.world_size)
    assert trained.step(0.0)[1]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
