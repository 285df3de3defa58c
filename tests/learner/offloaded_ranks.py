"""One rank of two updates on the launcher's backend, with ``learner.offload`` and then from its own parts.

    accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 offloaded_ranks.py MODEL
    OFFLOAD FOLDER

FOLDER/RESULT-RANK.json has the gradient norms, the norms of the weights after each update, those after the
second when it starts from parts written after the first, and where the optimizer's numbers are.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rltrain.checkpoint.shards import ShardedTensors, write_parts
from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.learner.packing import build
from rltrain.learner.ranks import background_group, connect, request_offload
from rltrain.learner.trained_model import TrainedModel
from rltrain.types.policy import TokenRows


def update(trained: TrainedModel, number: int) -> float:
    rows = TokenRows(((3, 4 + number, 5),) * 2, ((6, 7, 8 + trained.rank), (9, 10)))
    micro_batch = build(rows, [0, 1], layout=trained.layout, device=trained.device)
    with trained.backend.micro_batch(last=True):
        logp = trained.forward(micro_batch, temperature=1.0, wants=frozenset({"logp"}))["logp"]
        trained.backend.backward(-logp.sum())
    norm, stepped = trained.step(0.0)
    assert stepped
    return norm


def main(path: str, offload: Any, folder: Path) -> None:
    request_offload(offload)
    connect(120)
    settings = LearnerCore(optimizer=Optimizer(lr=1e-3, eps=1e-5), offload=offload, precision="float32")
    trained = TrainedModel(Model(path=path), settings, total_updates=4, seed=0)
    policy: Any = trained.wrapped_model
    stage = policy.zero_optimization_stage() if hasattr(policy, "zero_optimization_stage") else None
    gradient = [update(trained, 0)]
    weights = [trained.weight_norms()]
    group = background_group()
    write_parts(folder / "parts", list(trained.parts()), group)
    values = trained.state()
    gradient.append(update(trained, 1))
    weights.append(trained.weight_norms())
    trained.restore(ShardedTensors(folder / "parts"), values)
    assert trained.weight_norms() == weights[0]
    gradient.append(update(trained, 1))
    weights.append(trained.weight_norms())
    if stage is None:
        offloaded = type(trained.accelerator.state.fsdp_plugin.cpu_offload).__name__
    else:
        config = policy.zero_offload_optimizer(), policy.zero_offload_param()
        offloaded = [str(getattr(part.device, "value", part.device)) if part else "none" for part in config]
    facts = {"stage": stage, "offloaded": str(offloaded)}
    result = {"gradient": gradient, "weights": weights, **facts}
    (folder / f"result-{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.barrier()


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
