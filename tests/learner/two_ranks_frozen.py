"""One rank of ``test_frozen_ranks.py``: a frozen model beside a trained one, under mixed precision.

accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 two_ranks_frozen.py MODEL OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rltrain.config.schema import Learner, Model, Optimizer, RolloutLearner
from rltrain.learner.backend import DeepSpeedBackend
from rltrain.learner.packing import build
from rltrain.learner.pair_learner import PREVIOUS, PairLearner
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.learner.ranks import connect
from rltrain.types.policy import TokenRows

ROWS = TokenRows(
    tuple(tuple(range(1, 9)) for _ in range(4)), tuple(tuple(range(20 + i, 40 + i)) for i in range(4))
)


LIVE = 4_000_000  # weights that ZeRO-3 may keep gathered; DeepSpeed's default is 1e9


def main(path: str, out: Path) -> None:
    connect(120)
    limit_zero()
    model = Model(path=path)
    settings = Learner(optimizer=Optimizer(lr=1e-3), precision="bfloat16")
    learner = PolicyLearner(model, settings, temperature=1.0, max_tokens=20, total_updates=1, seed=0)
    before = start_of_peak()
    learner.use_frozen("ref_logp", None, model)
    loading = peak_bytes() - before
    before = start_of_peak()
    if isinstance(learner.trained.backend, DeepSpeedBackend):
        learner.trained._set_masters(model, {})
    masters = peak_bytes() - before
    frozen = learner.frozen["ref_logp"]
    dtypes = {"frozen": set[str](), "policy": set[str]()}
    for who, module in (("frozen", frozen), ("policy", learner.trained.unwrapped_model)):
        layer: Any = module.inner.base_model.layers[0]
        layer.mlp.down_proj.register_forward_hook(lambda _m, _i, o, who=who: dtypes[who].add(str(o.dtype)))
    policy = learner.trained.wrapped_model
    is_zero = isinstance(learner.trained.backend, DeepSpeedBackend)
    counts = {"frozen": FsdpBytes(frozen), "policy": (ZeroBytes if is_zero else FsdpBytes)(policy)}
    notes = learner.annotate(ROWS, frozenset({"logp", "ref_logp"}))
    annotated = {who: [count.peak, count.largest_group()] for who, count in counts.items()}
    left = counts["policy"].held()
    gathered = [name for name, module in frozen.named_modules() if is_gathered(module)]
    update(learner)
    counts["policy"].peak = 0
    learner.annotate(ROWS, frozenset({"logp"}))
    annotated["policy after an update"] = [counts["policy"].peak, counts["policy"].largest_group()]
    result = {
        "dtypes": {who: sorted(names) for who, names in dtypes.items()},
        "difference": float((notes["logp"] - notes["ref_logp"]).abs().max()),
        "spread": float(notes["ref_logp"].std()),
        "bytes": sum(local(parameter).nbytes for parameter in frozen.parameters()),
        "parameters": sum(parameter.numel() for parameter in frozen.parameters()),
        "gathered": gathered,
        "annotate": annotated,
        "left": left,
        "loading": loading,
        "masters": masters,
        "largest": max(parameter.numel() for parameter in frozen.parameters()),
        "iterate": iterate_follows(model),
        "groups": groups_of(learner.trained.wrapped_model),
    }
    (out / f"rank-{learner.rank}.json").write_text(json.dumps(result))


def limit_zero() -> None:
    """ZeRO-3 keeps what it uses soon again, up to a limit, here one below the size of the model."""
    start = DeepSpeedBackend.__init__

    def start_limited(backend: DeepSpeedBackend, accelerator: Any, *arguments: Any) -> None:
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "stage3_prefetch_bucket_size": LIVE,
        }
        start(backend, accelerator, *arguments)

    DeepSpeedBackend.__init__ = start_limited


def start_of_peak() -> int:
    """Bytes of this process now, from where the system counts its peak anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def is_gathered(module: nn.Module) -> bool:
    """Whether a group of FSDP2 holds its whole parameters."""
    return isinstance(module, FSDPModule) and any(
        not isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)
    )


def iterate_follows(model: Model) -> list[str]:
    """Weights of a kept iterate that are not the policy's rounded, before and after a restore."""
    settings = RolloutLearner(optimizer=Optimizer(lr=1e-3), precision="bfloat16")
    learner = PairLearner(model, settings, temperature=1.0, total_updates=1, seed=0)
    learner.keep_iterate(model)
    prefix = "previous/"

    def differing() -> list[str]:
        weights = dict(learner.model_weights())
        kept = {
            name.removeprefix(prefix): weight.clone()
            for name, weight in learner.optimizer_state()
            if name.startswith(prefix)
        }
        return [n for n, weight in kept.items() if not torch.equal(weight, weights[n].to(weight.dtype))]

    different = differing()
    saved = {name: tensor.clone() for name, tensor in learner.optimizer_state()}
    with torch.no_grad():
        for parameter in learner.frozen[PREVIOUS].parameters():
            local(parameter).zero_()
    learner.restore(saved, learner.state())
    return different + differing()


class GatheredBytes:
    """The bytes of weights that are gathered in ``model``, at most, when one of its modules begins."""

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        for module in model.modules():
            module.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, inputs: Any) -> None:
        del module, inputs
        self.peak = max(self.peak, self.held())

    def held(self) -> int:
        raise NotImplementedError

    def largest_group(self) -> int:
        """Of what is gathered together."""
        raise NotImplementedError


class FsdpBytes(GatheredBytes):
    """By FSDP2's groups."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        groups: list[Any] = [module._get_fsdp_state()._fsdp_param_group for module in modules]
        self._groups = {
            id(group): group for group in groups if group is not None
        }.values()  # a tied pair's once

    def held(self) -> int:
        return sum(output.untyped_storage().size() for group in self._groups for output in outputs_of(group))

    def largest_group(self) -> int:
        return max((sum(output.nbytes for output in outputs_of(group)) for group in self._groups), default=0)


class ZeroBytes(GatheredBytes):
    """By ZeRO-3, without weights below DeepSpeed's threshold, 100,000 numbers, which every rank keeps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._divided: list[Any] = [weight for weight in model.parameters() if not vars(weight)["ds_persist"]]

    def held(self) -> int:
        return sum(weight.nbytes for weight in self._divided)  # an empty tensor where it is divided

    def largest_group(self) -> int:
        """What may be gathered: as many weights as the limit says, and those of the module that runs."""
        size = max(weight.element_size() for weight in self._divided)
        return size * (LIVE + max(weight.ds_numel for weight in self._divided))


def update(learner: PolicyLearner) -> None:
    trained = learner.trained
    micro_batch = build(ROWS, [0], layout=trained.layout, device=trained.device)
    with trained.backend.micro_batch(last=True):
        logp = trained.forward(micro_batch, temperature=1.0, wants=frozenset({"logp"}))["logp"]
        trained.backend.backward(-logp.sum())
    assert trained.step(0.0)[1]


def outputs_of(group: Any) -> list[torch.Tensor]:
    """What a group has gathered; without storage where it is freed again."""
    return [output for parameter in group.fsdp_params for output in parameter.all_gather_outputs]


def groups_of(policy: nn.Module) -> dict[str, list[str]]:
    """The parameters of each group of FSDP2, by the group's module."""
    groups: dict[str, list[str]] = {}
    for name, module in policy.named_modules():
        if isinstance(module, FSDPModule):
            group: Any = module._get_fsdp_state()._fsdp_param_group
            parameters = group.fsdp_params if group is not None else []
            groups[name] = [str(parameter._param_fqn) for parameter in parameters]
    return groups


main(sys.argv[1], Path(sys.argv[2]))
