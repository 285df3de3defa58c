"""One rank of ``test_weight_streams.py``: after a mixed-precision update, the streams of weights agree.

accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 two_ranks_weights.py
MODEL OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.learner.packing import build
from rltrain.learner.ranks import connect
from rltrain.learner.trained_model import TrainedModel
from rltrain.tensor_ops import weight_fingerprint
from rltrain.types.policy import TokenRows

LOGP = frozenset({"logp"})


def main(model: str, out: Path) -> None:
    connect(120)
    settings = Learner(optimizer=Optimizer(lr=1e-3), precision="bfloat16")
    trained = TrainedModel(Model(path=model), settings, total_updates=4, seed=0)
    stored = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    rounded_at_start = [n for n, weight in trained.model_weights() if not torch.equal(weight, stored[n])]
    before = trained.weight_norms()
    unchanged = trained.weight_norms()
    update(trained)
    after = trained.weight_norms()

    exact = dict(trained.weights())
    rounded = dict(trained.weights(torch.bfloat16))
    full_norms = [float(torch.linalg.vector_norm(w, dtype=torch.float64)) for _, w in trained.model_weights()]
    result = {
        "rank": trained.rank,
        "exact": sorted({str(weight.dtype) for weight in exact.values()}),
        "rounded": sorted({str(weight.dtype) for weight in rounded.values()}),
        "differing": [
            name for name in exact if not torch.equal(exact[name].bfloat16(), rounded[name].bfloat16())
        ],
        "shards": max(shards_difference(trained, weights) for weights in (exact, rounded)),
        "rounded_at_start": rounded_at_start,
        "unchanged": before == unchanged,
        "still": [index for index, norm in enumerate(after) if norm == before[index]],
        "ratios": sorted({round(norm / full, 9) for norm, full in zip(after, full_norms, strict=True)}),
    }
    (out / f"rank-{trained.rank}.json").write_text(json.dumps(result))


def shards_difference(trained: TrainedModel, weights: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a gathered weight's fingerprint from that of the shards."""
    (dtype,) = {weight.dtype for weight in weights.values()}
    sums = trained.weight_fingerprints(dtype)
    pairs = [(weight_fingerprint(name, weight).number, sums[name].number) for name, weight in weights.items()]
    return max(abs(gathered - held) / max(abs(held), 1e-30) for gathered, held in pairs)


def update(trained: TrainedModel) -> None:
    """One step towards larger log-probs of a row."""
    rows = TokenRows(((5, 6),), ((7, 8, 9),))
    micro_batch = build(rows, [0], layout=trained.layout, device=trained.device)
    with trained.backend.micro_batch(last=True):
        logp = trained.forward(micro_batch, temperature=1.0, wants=LOGP)["logp"]
        trained.backend.backward(-logp.sum())
    assert trained.step(0.0)[1]


main(sys.argv[1], Path(sys.argv[2]))
