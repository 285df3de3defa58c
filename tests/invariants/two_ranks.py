"""One rank of runs on the backend that ``accelerate launch`` was told of: whole; stopped and continued;
continued for another; continued from parts.

    accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 two_ranks.py FOLDER
    CHECKPOINT OFFLOAD OVERRIDE...

FOLDER/whole is a run of its own, FOLDER/resumed goes on from its middle, FOLDER/taken_over from the middle of
the run that CHECKPOINT is of, whatever backend that had. FOLDER/resumed writes sharded checkpoints, and
FOLDER/from_parts takes the last step from one of them. With another OFFLOAD than "nothing" there are only
FOLDER/whole, which writes sharded checkpoints, and FOLDER/resumed. FOLDER/engaged-RANK.json says what the
model really was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rltrain.build.workflows import WORKFLOWS
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check

ROOT = Path(__file__).parents[2]
MOST_GATHERED = 2  # tensors at once: one on its way out, one on its way in


def main() -> None:
    out = Path(sys.argv[1])
    checkpoint, offload = sys.argv[2:4]
    overrides = [*sys.argv[4:], f"learner.offload={offload}"]
    in_parts = ["checkpoint.format=sharded", f"checkpoint.every={1 if offload == 'nothing' else 2}"]
    recipe, sharded = (
        check(load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=settings)).recipe
        for settings in (overrides, [*overrides, *in_parts])
    )
    online = WORKFLOWS["online"]
    engaged = []

    def build(*arguments: Any) -> Any:
        run: Any = online.build(*arguments)
        trained = run.learner.trained
        parameter = next(trained.unwrapped_model.parameters())
        policy = trained.wrapped_model
        kinds = {
            "rank": trained.rank,
            "ranks": trained.world_size,
            "policy": [kind.__name__ for kind in type(policy).__mro__],
        }
        weights = {"parameter": type(parameter).__name__, "elements": parameter.numel()}
        weights["offload"] = offload_of(trained.accelerator)
        facts = {"stage": stage_of(policy), "saves_parts": arguments[0].checkpoint.format == "sharded"}
        engaged.append(kinds | weights | facts | {"peaks": count_gathered(run.learner)})
        return run

    WORKFLOWS["online"] = dataclasses.replace(online, build=build)
    if offload == "nothing":
        runs = (
            ("whole", recipe, "auto"),
            ("resumed", sharded, str(out / "whole/checkpoints/step-2")),
            ("taken_over", recipe, checkpoint),
            ("from_parts", recipe, str(out / "resumed/checkpoints/step-3")),
        )
    else:
        runs = (
            ("whole", sharded, "auto"),
            ("resumed", sharded, str(out / "whole/checkpoints/step-2")),
        )
    for name, settings, resume in runs:
        assert train_command(settings, out / name, [], resume) == 0
    (out / f"engaged-{os.environ['RANK']}.json").write_text(json.dumps(engaged))


def count_gathered(learner: Any) -> dict[str, int]:
    """The largest number of gathered tensors alive at once, by kind of stream; filled by the run."""
    trained = learner.trained
    peaks = {"push": 0, "save": 0, "optimizer": 0}
    parameter = next(trained.unwrapped_model.parameters())
    is_divided = isinstance(parameter, DTensor) or stage_of(trained.wrapped_model) == 3

    def counted(stream: Any, kind: str) -> Any:
        alive: list[Any] = []
        # rank 0 holds the tensors of a file, DDP and ZeRO-2 all weights
        waits = is_divided and (kind == "push" or trained.rank != 0)
        patience = 5.0 if waits else 0.0
        for name, tensor in stream:
            if tensor.ndim:  # counters of updates are the optimizer's own
                alive.append(tensor.untyped_storage()._weak_ref())
            while True:  # gloo's own threads let go of what they gathered a moment later
                alive = [storage for storage in alive if not torch.UntypedStorage._expired(storage)]
                if len(alive) <= MOST_GATHERED or patience <= 0:
                    break
                time.sleep(0.01)
                patience -= 0.01
            peaks[kind] = max(peaks[kind], len(alive))
            yield name, tensor
            del tensor

    weights = trained.model_weights
    optimizer = trained.optimizer_state
    trained.model_weights = lambda dtype=None: counted(weights(dtype), "save" if dtype is None else "push")
    trained.optimizer_state = lambda: counted(optimizer(), "optimizer")
    return peaks


def offload_of(accelerator: Any) -> list[str]:
    """What the backend keeps on the host, in its own words."""
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        return [plugin.offload_optimizer_device, plugin.offload_param_device]
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return [] if plugin is None else [type(plugin.cpu_offload).__name__]


def stage_of(policy: Any) -> int | None:
    return policy.zero_optimization_stage() if hasattr(policy, "zero_optimization_stage") else None


main()
