"""One rank of ``test_layer_kernels.py``: two updates with compiled layers beside the same with eager ones.

accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 two_ranks_compiled.py MODEL
OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.learner.layer_kernels import Kernels
from rltrain.learner.packing import build
from rltrain.learner.ranks import connect
from rltrain.learner.trained_model import TrainedModel
from rltrain.types.policy import TokenRows

# of other lengths at each update: kernels for the first's would be wrong for the second's
UPDATES = (TokenRows(((5, 6),), ((7, 8, 9),)), TokenRows(((1, 2, 3, 4),), ((5, 6, 7, 8, 9, 1, 2),)))


def main(path: str, out: Path) -> None:
    connect(300)
    eager = Trained(path, "eager")
    before = counters["stats"]["unique_graphs"]
    compiled = Trained(path, "compiled")
    result = {
        "graphs": counters["stats"]["unique_graphs"] - before,
        "logp": float((compiled.logp - eager.logp).abs().max()),
        "weights": max(
            float((compiled.weights[name] - eager.weights[name]).abs().max()) for name in eager.weights
        ),
        "moved": max(float((eager.weights[name] - eager.start[name]).abs().max()) for name in eager.weights),
    }
    (out / f"rank-{eager.rank}.json").write_text(json.dumps(result))


class Trained:
    """A model after the updates, and the log-probs that they saw."""

    def __init__(self, path: str, kernels: Kernels) -> None:
        # of this eps, AdamW moves no weight far for a gradient that is rounding
        optimizer = Optimizer(lr=1e-3, eps=1e-3)
        settings = Learner(optimizer=optimizer, precision="float32", kernels=kernels)
        model = TrainedModel(Model(path=path), settings, total_updates=2, seed=0)
        self.rank = model.rank
        self.start = copy_weights(model)
        self.logp = torch.cat([update(model, rows) for rows in UPDATES])
        self.weights = copy_weights(model)


def copy_weights(model: TrainedModel) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.model_weights()}


def update(model: TrainedModel, rows: TokenRows) -> Tensor:
    micro_batch = build(rows, [0], layout=model.layout, device=model.device)
    with model.backend.micro_batch(last=True):
        logp = model.forward(micro_batch, temperature=1.0, wants=frozenset({"logp"}))["logp"]
        model.backend.backward(-logp.sum())
    assert model.step(0.0)[1]
    return logp.detach().flatten()


main(sys.argv[1], Path(sys.argv[2]))
