"""The plan for a cluster: golden tables, agreement with bytes of real tensors, remedies, the command."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rltrain.cli.app import app
from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.constants import CARDS, GB, Card
from rltrain.config.capacity.duration import head_seconds, step_durations
from rltrain.config.capacity.memory import (
    OVERHEADS,
    Phase,
    cache_tokens,
    frozen_term,
    gradient_term,
    kv_bytes,
    moment_term,
    phases_of,
    weight_terms,
    with_recomputation,
    with_utilization,
)
from rltrain.config.capacity.remedy import highest_utilization, nearest_fit
from rltrain.config.capacity.shape import ModelShape, shape_of
from rltrain.config.capacity.workload import Frozen, Trained, Workload, workload_of
from rltrain.config.fragments import kind_of
from rltrain.config.load import load_recipe
from support.scripts import SCRIPTS, script
from support.warm import run_program

ROOT = SCRIPTS.parent
H100 = int(85.5 * GB)
OF_24_GB = int(24.1 * GB)  # what an L4 or A10G has; an RTX 4090 has 25.8

CONFIGS = {
    "1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "32B": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def shape(size: str) -> ModelShape:
    model_shape = shape_of(CONFIGS[size])
    assert model_shape is not None
    return model_shape


def workload(
    recipe: str, size: str, *overrides: str, profile: str | None = None, share: float | str = 0.45
) -> Workload:
    """A recipe's workload with ``size`` as its model, vLLM's share of the GPU being ``share``. Clip-Cov's
    prompts have at most 1,024 tokens, whatever the recipe says: the numbers below were computed for that
    length.
    """
    path = ROOT / "recipes" / f"{recipe}.yaml"
    settings = ["data.max_prompt_tokens=1024"] if recipe == "policy/clip_cov" else []
    if load_recipe(path, profile=profile).kind != "offline":
        settings.append(f"rollout.vllm.gpu_memory_utilization={share}")
    loaded = load_recipe(path, profile=profile, overrides=(*settings, *overrides))
    return workload_of(loaded, lambda path, revision: shape(size))


def cluster(gpus: int, backend: str = "fsdp2", gpu_bytes: int = H100) -> Cluster:
    return Cluster(gpus, gpu_bytes, Backend(backend))


def gigabytes(phases: tuple[Phase, ...], *, with_overheads: bool = True) -> dict[str, float]:
    return {
        phase.name: round(
            sum(term.bytes for term in phase.terms if with_overheads or term.name not in OVERHEADS) / GB, 1
        )
        for phase in phases
    }


# golden tables ----------------------------------------------------------------------------------------------

# Clip-Cov at the paper's sizes (no reference, 32,768 tokens per micro-batch, utilisation 0.45), and DPO. A
# few by hand, 7B, N = 7.616e9, 8 GPUs: FSDP2 at rest 12 N / 8 = 11.4; ZeRO-2 2 N + 12 N / 8 = 26.7; ZeRO-3
# 14 N / 8 = 13.3; DDP with its buckets 16 N = 121.8; each + 3.0 outside tensors. Engine start: FSDP2 4 N /
# 8 + 0.45 x 85.5 + 3 = 45.3. Update under FSDP2: 16 N / 8 = 15.2, kept 28 x 32,768 x 3,584 x 2 = 6.6, layer
# 13.1, head 3.3, gathered 2.0, reduced 4.5, 3.0: 47.7. PRIME at rest: 2 x 12 N / 8, its reference 2 N / 8,
# 3.0: 27.8.
GOLDEN = {
    ("policy/clip_cov", "1.5B", 1, "ddp"): {
        "load, on the host": 6.2,
        "learner at rest": 20.8,
        "engine start": 46.9,
        "one row in the engine": 4.7,
        "push": 47.9,
        "rollout": 59.3,
        "annotate": 27.9,
        "update": 40.7,
        "save": 61.2,
    },
    ("policy/clip_cov", "7B", 8, "fsdp2"): {
        "load, on the host": 30.5,
        "learner at rest": 14.4,
        "engine start": 45.3,
        "one row in the engine": 18.4,
        "push": 47.5,
        "rollout": 52.9,
        "annotate": 23.8,
        "update": 47.7,
        "save": 57.3,
    },
    ("policy/clip_cov", "7B", 8, "zero2"): {
        "load, on the host": 30.5,
        "learner at rest": 29.7,
        "engine start": 60.5,
        "one row in the engine": 18.4,
        "push": 62.7,
        "rollout": 68.1,
        "annotate": 37.0,
        "update": 59.4,
        "save": 72.5,
    },
    ("policy/clip_cov", "7B", 8, "zero3"): {
        "load, on the host": 30.5,
        "learner at rest": 16.3,
        "engine start": 47.2,
        "one row in the engine": 18.4,
        "push": 49.4,
        "rollout": 54.8,
        "annotate": 25.8,
        "update": 48.2,
        "save": 59.2,
    },
    ("policy/clip_cov", "7B", 8, "ddp"): {
        "load, on the host": 30.5,
        "learner at rest": 124.8,
        "engine start": 102.4,
        "one row in the engine": 18.4,
        "push": 142.3,
        "rollout": 163.3,
        "annotate": 147.4,
        "update": 156.6,
        "save": 167.7,
    },
    ("policy/prime", "7B", 8, "fsdp2"): {
        "load, on the host": 30.5,
        "learner at rest": 27.8,
        "engine start": 45.3,
        "one row in the engine": 18.1,
        "push": 53.2,
        "rollout": 66.2,
        "annotate": 37.1,
        "update": 61.1,
        "save": 70.6,
    },
    ("policy/dapo", "32B", 32, "fsdp2"): {
        "load, on the host": 131.1,
        "learner at rest": 15.3,
        "engine start": 45.6,
        "one row in the engine": 75.1,
        "push": 83.9,
        "rollout": 53.8,
        "annotate": 29.0,
        "update": 75.6,
        "save": 60.0,
    },
    ("preference/dpo", "32B", 8, "zero3"): {
        "load, on the host": 131.1,
        "learner at rest": 43.0,  # RMSprop keeps one state of each weight
        "annotate": 34.4,
        "update": 88.9,
        "save": 49.2,
    },
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case)))
def test_the_table_of(case: tuple[str, str, int, str]) -> None:
    recipe, size, gpus, backend = case
    assert gigabytes(phases_of(workload(recipe, size), cluster(gpus, backend))) == GOLDEN[case]


def test_verdicts_follow_from_the_limits() -> None:
    load = workload("policy/dapo", "32B")
    phases = {phase.name: phase for phase in phases_of(load, cluster(32))}
    # 65.5 GB of weights do not fit 0.45 of the card, though the card itself would hold every other phase
    assert [name for name, phase in phases.items() if not phase.fits] == ["one row in the engine"]
    assert phases["load, on the host"].limit is None


def test_a_frozen_model_is_divided_in_the_learners_precision() -> None:
    # N = 7.616e9: 2 N over the GPUs more at rest; under DDP 2 N, and 2 more bytes of each number of the
    # embedding, 152,064 x 3,584, and of 57 norms of 3,584
    for where, expected in (
        (cluster(8), 2 * 7_615_616_512 // 8),
        (cluster(64, "zero3"), 2 * 7_615_616_512 // 64),
        (cluster(8, "ddp"), 2 * 7_615_616_512 + 2 * (152_064 + 57) * 3_584),
    ):
        rest = [
            phases_of(workload(recipe, "7B"), where)[1].total for recipe in ("policy/rloo", "policy/clip_cov")
        ]
        assert rest[0] - rest[1] == expected


def test_offline_references_are_free_before_the_update() -> None:
    start = workload("preference/dpo", "7B")
    other = workload("preference/dpo", "7B", "model.reference=models/other")
    names = ("annotate", "update")
    start_bytes, other_bytes = (
        {phase.name: phase.total for phase in phases_of(load, cluster(8))} for load in (start, other)
    )
    assert [other_bytes[name] > start_bytes[name] for name in names] == [True, False]


# bytes of real tensors --------------------------------------------------------------------------------------


def tiny_config(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "gpt_neox" else 2,
        "intermediate_size": 160,
        "vocab_size": 512,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    } | changes


def tiny_model(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config["model_type"]
    rest = {key: value for key, value in config.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **rest))


KINDS = [
    tiny_config("qwen2"),
    tiny_config("qwen2", tie_word_embeddings=True),
    tiny_config("qwen3", head_dim=32),
    tiny_config("llama"),
    tiny_config("llama", attention_bias=True, mlp_bias=True),
    tiny_config("mistral"),
    tiny_config("gemma", head_dim=16, tie_word_embeddings=True),
    tiny_config("gpt_neox"),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config["model_type"])
def test_parameters_are_those_of_the_real_model(config: dict[str, Any]) -> None:
    model_shape = shape_of(config)
    assert model_shape is not None
    model = tiny_model(config)
    assert model_shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert model_shape.largest_tensor == max(weight.numel() for weight in model.parameters())


def test_published_models_have_their_published_number_of_parameters() -> None:
    shapes = script("model_shapes")
    for path, model in shapes.PUBLISHED.items():
        assert shapes.shape_of_published(path, None).parameters == model.parameters, path


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt2"])
def test_a_model_of_another_kind_is_not_guessed_at(kind: str) -> None:
    assert shape_of(tiny_config(kind)) is None


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def within_5_percent(planned: int, counted: int) -> bool:
    return abs(planned - counted) <= 0.05 * counted


def test_gradients_states_and_cache_of_a_real_model_on_one_device() -> None:
    import torch

    config = tiny_config("qwen2")
    model = tiny_model(config)
    planned = shape_of(config)
    assert planned is not None
    optimizer = torch.optim.AdamW(model.parameters())
    output = model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None], use_cache=True)
    output.loss.backward()
    optimizer.step()
    trained, single = Trained("policy", planned), cluster(1)

    assert within_5_percent(weight_terms(trained, single, 2)[0].bytes, nbytes(model.parameters()))
    gradients = nbytes(weight.grad for weight in model.parameters())
    assert within_5_percent(gradient_term(trained, single).bytes, gradients)
    states = nbytes(value for state in optimizer.state.values() for value in state.values())
    assert within_5_percent(moment_term(trained, single).bytes, states)
    layers = output.past_key_values.layers
    cache = nbytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
    assert within_5_percent(kv_bytes(planned, 20, 4), cache)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config["model_type"])
def test_a_frozen_model_is_within_five_per_cent_of_real_bytes(config: dict[str, Any]) -> None:
    import torch

    from rltrain.learner.forward import PolicyForward
    from rltrain.learner.frozen_models import stored_dtypes

    model_shape = shape_of(config)
    assert model_shape is not None
    frozen = PolicyForward(tiny_model(config))
    for where, throughout in ((cluster(1), False), (cluster(4, "zero2"), True)):
        dtypes = stored_dtypes(frozen, torch.bfloat16, throughout=throughout)
        counted = sum(
            weight.numel() * dtypes[name].itemsize for name, weight in frozen.named_parameters()
        ) // (4 if throughout else 1)
        planned = frozen_term(Frozen("reference", model_shape), where, 2).bytes
        assert within_5_percent(planned, counted)


def test_zero_holds_a_copy_whole_or_in_shards_and_masters_in_shards() -> None:
    import torch

    config, ranks = tiny_config("qwen2"), 4
    weights = list(tiny_model(config).parameters())
    planned = shape_of(config)
    assert planned is not None
    copies = nbytes(weight.to(torch.bfloat16) for weight in weights)
    masters = sum(-(-weight.numel() // ranks) * 4 for weight in weights)
    for backend, counted in (("zero2", copies + masters), ("zero3", copies // ranks + masters)):
        terms = weight_terms(Trained("policy", planned), cluster(ranks, backend), 2)
        assert within_5_percent(sum(term.bytes for term in terms), counted), backend


COUNT_SHARDS = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

config = json.loads(sys.argv[1])
dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
if sys.argv[2] == "ddp":
    from torch.nn.parallel import DistributedDataParallel
    wrapped = DistributedDataParallel(model)
    buckets = [bucket.buffer() for bucket in wrapped.reducer._get_zeros_like_grad_buckets()]
    print(json.dumps({"buckets": sum(buffer.numel() * buffer.element_size() for buffer in buckets)}))
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (4,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    local = lambda tensor: tensor.to_local() if hasattr(tensor, "to_local") else tensor
    size = lambda tensors: sum(local(t).numel() * t.element_size() for t in tensors)
    print(json.dumps({
        "weights": size(model.parameters()),
        "gradients": size(weight.grad for weight in model.parameters()),
        "states": size(value for state in optimizer.state.values() for value in state.values()),
    }))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_buckets_and_shards_of_a_rank_among_four(backend: str) -> None:
    # one process of a group whose other members are not there: no collective's result is used
    config = tiny_config("qwen2")
    command = [sys.executable, "-c", COUNT_SHARDS, json.dumps(config), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    planned = shape_of(config)
    assert planned is not None
    trained, four = Trained("policy", planned), cluster(4, backend)
    terms = weight_terms(trained, four, 2)
    if backend == "ddp":
        assert within_5_percent(terms[1].bytes, counted["buckets"])
        return
    assert within_5_percent(terms[0].bytes, counted["weights"])
    assert within_5_percent(gradient_term(trained, four).bytes, counted["gradients"])
    assert within_5_percent(moment_term(trained, four).bytes, counted["states"])


# profiles, remedies and seconds -----------------------------------------------------------------------------

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if kind_of(path) == "recipe")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_one_gpu_fits_the_24_gb_that_it_names(path: Path) -> None:
    recipe = load_recipe(path, profile="one_gpu")
    load = workload_of(recipe, script("model_shapes").shape_of_published)
    phases = phases_of(load, Cluster(1, OF_24_GB, Backend.ddp))
    assert [(phase.name, phase.total) for phase in phases if not phase.fits] == []


def test_what_one_gpu_used_to_name_did_not_fit() -> None:
    # 16 bytes x 1.544e9 parameters = 24.7 GB before the first activation
    load = workload("policy/clip_cov", "1.5B", "model.path=any", profile="one_gpu")
    phases = {phase.name: phase for phase in phases_of(load, cluster(1, gpu_bytes=OF_24_GB))}
    assert not phases["update"].fits


def test_remedies_come_in_the_stated_order() -> None:
    plain = workload("policy/clip_cov", "7B")
    first = nearest_fit(plain, cluster(8))
    assert first is not None
    assert first.describe() == ""  # it fits as it is
    fewer_tokens = nearest_fit(replace(plain, tokens=8 * 32768), cluster(8))
    assert fewer_tokens is not None
    assert fewer_tokens.describe() == "learner.tokens_per_micro_batch 65536"
    utilization = nearest_fit(workload("policy/clip_cov", "7B", share=0.9), cluster(8))
    assert utilization is not None
    assert utilization.describe() == "rollout.vllm.gpu_memory_utilization 0.75"
    both = nearest_fit(plain, cluster(2))
    assert both is not None
    assert (both.tokens_per_micro_batch, both.gpu_memory_utilization) == (16384, 0.35)
    backend = nearest_fit(plain, cluster(8, "ddp"))
    assert backend is not None
    assert backend.describe() == "--backend fsdp2"
    more = nearest_fit(plain, cluster(1))
    assert more is not None
    assert more.describe() == (
        "learner.tokens_per_micro_batch 16384, rollout.vllm.gpu_memory_utilization 0.35, --gpus 2"
    )
    together = nearest_fit(workload("policy/dapo", "32B"), cluster(32))  # 65.5 GB of weights in the engine
    assert together is not None
    assert together.describe() == ("rollout.vllm.gpu_memory_utilization 0.5, rollout.vllm.tensor_parallel 2")


@pytest.mark.parametrize("recipe", ["policy/prime", "policy/rloo", "preference/dpo", "preference/online_dpo"])
def test_a_remedy_fits(recipe: str) -> None:
    load = workload(recipe, "7B")
    for gpus in (1, 2, 8):
        remedy = nearest_fit(load, cluster(gpus, "zero2"))
        assert remedy is not None
        changed = load.change(
            remedy.tokens_per_micro_batch or load.tokens,
            remedy.gpu_memory_utilization,
            remedy.tensor_parallel,
        )
        candidate = cluster(remedy.gpus or gpus, remedy.backend or "zero2")
        assert all(phase.fits for phase in phases_of(changed, candidate))


def test_more_gpus_never_take_more_each() -> None:
    load = workload("policy/prime", "7B")
    for backend in ("fsdp2", "zero2", "zero3"):
        totals = [
            {phase.name: phase.total for phase in phases_of(load, cluster(gpus, backend)) if phase.limit}
            for gpus in (2, 4, 8, 16)
        ]
        for fewer, more in itertools.pairwise(totals):
            assert all(more[name] <= fewer[name] for name in fewer), backend


def test_the_highest_utilisation_is_the_last_that_fits() -> None:
    load = workload("policy/clip_cov", "7B")
    share = highest_utilization(load, cluster(8))
    assert share == 0.75
    assert all(phase.fits for phase in phases_of(load.change(load.tokens, share), cluster(8)))
    assert not all(phase.fits for phase in phases_of(load.change(load.tokens, 0.8), cluster(8)))


def test_an_open_utilisation_is_what_the_learner_leaves() -> None:
    for recipe, gpus, backend in (
        ("policy/clip_cov", 8, "fsdp2"),
        ("policy/clip_cov", 8, "zero2"),
        ("policy/prime", 8, "fsdp2"),
        ("policy/rloo", 4, "zero3"),
        ("preference/online_dpo", 8, "fsdp2"),
    ):
        where = cluster(gpus, backend)
        load = with_utilization(workload(recipe, "7B", share="auto"), where)
        assert load.engine is not None and load.engine.utilization is not None
        assert all(phase.fits for phase in phases_of(load, where)), (recipe, backend)
        more = load.change(load.tokens, load.engine.utilization + 0.04)
        assert not all(phase.fits for phase in phases_of(more, where)), (recipe, backend)
    # a learner without anything at rest would leave more than vLLM is ever given
    small = with_utilization(
        workload("policy/clip_cov", "1.5B", share="auto"), cluster(8, gpu_bytes=400 * GB)
    )
    assert small.engine is not None and small.engine.utilization == 0.9
    assert with_utilization(workload("preference/dpo", "7B"), cluster(8)).engine is None


def test_as_few_layers_are_recomputed_as_there_is_no_room_for() -> None:
    # 7B on eight GPUs: 28 layers keep 6.6 GB of inputs, or 28 x 7.9 GB
    where = cluster(8)
    auto = workload("policy/clip_cov", "7B", "learner.gradient_checkpointing=auto")
    chosen = with_recomputation(auto, where)
    assert chosen.recomputed is not None and 0 < chosen.recomputed < 1
    assert all(phase.fits for phase in phases_of(chosen, where))
    fewer = replace(chosen, recomputed=chosen.recomputed - 0.1)
    [update] = [phase for phase in phases_of(fewer, where) if phase.name == "update"]
    assert update.total > 0.97 * H100
    small = with_recomputation(
        workload("preference/dpo", "1.5B", "learner.gradient_checkpointing=auto"),
        cluster(8, gpu_bytes=141 * GB),
    )
    assert small.recomputed == 0.0
    tight = with_recomputation(auto, cluster(8, gpu_bytes=24 * GB))
    assert tight.recomputed == 1.0  # nothing fits
    seconds = [
        step_durations(load, where, CARDS[Card.h100])[2].seconds
        for load in (chosen, replace(chosen, recomputed=1.0))
    ]
    assert seconds[0] < seconds[1]


def test_seconds_of_a_step_are_the_arithmetic_of_their_rates() -> None:
    load = workload("policy/clip_cov", "7B")
    durations = {item.phase: item for item in step_durations(load, cluster(8), CARDS[Card.h100])}
    # 0.45 x 85.5 - 15.2 - 2.6 GB of cache at 57,344 bytes per token: 38 rows of 9,216 tokens at a time. 256
    # rows of 8,192 tokens then take 55,200 decoding steps, each reading 15.2 GB of weights and 11.1 GB of
    # half-full cache at 2.81e12 bytes/s, + 1 ms: 10.4 ms.
    assert cache_tokens(load, cluster(8)) // load.row_tokens == 38
    assert durations["rollout"].seconds == pytest.approx(573, abs=1)
    assert "38 of 256 rows at once, the cache is full" in durations["rollout"].limit
    assert durations["update"].seconds == pytest.approx(308, abs=1)
    assert durations["update"].limit == "matrix products, 37% of the peak"


def test_compiled_layers_take_an_update_of_7b_on_eight_gpus_beyond_forty_per_cent_of_the_peak() -> None:
    load = workload("policy/clip_cov", "7B", "learner.kernels=compiled")
    durations = {item.phase: item for item in step_durations(load, cluster(8), CARDS[Card.h100])}
    assert durations["update"].seconds == pytest.approx(281, abs=1)
    assert durations["update"].limit == "matrix products, 41% of the peak"


def test_the_head_at_larger_chunks_moves_fewer_bytes() -> None:
    # 16,384 tokens of a 7B model: four products of 2 x 16,384 x 545e6 FLOP at 603e12 take 118.4 ms, the
    # logits' 8 bytes at 2.81e12 bytes/s 7.1 ms. At 256 tokens the gradient of 2.18 GB is read and written 64
    # times, 99.2 ms in place of its product's 29.6.
    seconds = [
        head_seconds(shape("7B"), 16384, chunk, CARDS[Card.h100], update=True) for chunk in (256, 1024, 4096)
    ]
    assert seconds == pytest.approx([0.1950, 0.1255, 0.1255], abs=0.0001)


# command and page -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["7B"]))
    return str(tmp_path)


def run_plan(*arguments: str) -> Any:
    recipe = str(ROOT / "recipes/policy/clip_cov.yaml")
    return CliRunner().invoke(app, ["plan", recipe, *arguments], env={"COLUMNS": "200"})


def test_the_command_prints_phases_verdict_and_seconds(folder: str) -> None:
    done = run_plan("--set", f"model.path={folder}", "--gpus", "8", "--gpu-gb", "85.5")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "8 x 85.5 GB, fsdp2; policy 7,615,616,512 parameters"
    rollout = next(line for line in lines if line.startswith("rollout"))
    assert rollout.split()[1:4] == ["78.5", "85.5", "FITS"]
    assert "FITS; vLLM gets 0.75 of each GPU" in lines
    assert "bottleneck: rollout" in lines[-1]
    stated = run_plan(
        *("--set", f"model.path={folder}", "--gpus", "8", "--gpu-gb", "85.5"),
        *("--set", "rollout.vllm.gpu_memory_utilization=0.45"),
    )
    assert "FITS; with rollout.vllm.gpu_memory_utilization up to 0.75" in stated.output


def test_the_command_says_what_fits_instead(folder: str) -> None:
    done = run_plan("--set", f"model.path={folder}", "--gpus", "8", "--gpu-gb", "85.5", "--backend", "ddp")
    assert done.exit_code == 1
    assert "OOM; fits with --backend fsdp2" in done.output
    assert "bottleneck" not in done.output  # no seconds for a run that does not start
    divided = run_plan("--set", f"model.path={folder}", "--gpus", "1", "--gpu-gb", "24.1")
    assert "rollout.vllm.tensor_parallel 2, --gpus 32" in divided.output
    refused = run_plan("--set", f"model.path={folder}", "--gpus", "1", "--gpu-gb", "12")
    assert "OOM; even on 1024 GPUs" in refused.output


SERVER = ("--set", "rollout.engine=vllm_server", "--set", "rollout.server.tensor_parallel=2")


def test_a_server_takes_gpus_of_its_own(folder: str) -> None:
    size = ("--set", f"model.path={folder}", "--gpu-gb", "85.5", *SERVER)
    done = run_plan(*size, "--gpus", "8")
    assert done.exit_code == 0, done.output
    first = (
        "6 x 85.5 GB, fsdp2; policy 7,615,616,512 parameters; beside them 2 of this machine for the server"
    )
    assert done.output.splitlines()[0] == first
    plan = json.loads(run_plan(*size, "--gpus", "8", "--json").output)
    assert (plan["gpus"], plan["server_gpus"]) == (6, 2)
    phases = {phase["name"]: phase["terms"] for phase in plan["phases"]}
    # a push holds two buckets of 512 MiB and the embedding in bfloat16; the engine's weights are elsewhere
    assert phases["push"]["two buckets and the largest tensor"] == 2**30 + 2 * 152_064 * 3584
    assert not any(name.startswith(("engine", "vLLM")) for name in phases["push"] | phases["rollout"])
    assert phases["one row in the engine"]["engine: weights"] == 7_615_616_512  # 2 bytes each, 2 GPUs
    elsewhere = run_plan(*size, "--set", "rollout.server.url=https://host:8000", "--gpus", "8")
    assert elsewhere.output.startswith("8 x 85.5 GB") and "2 on another machine" in elsewhere.output
    assert "takes 2 of them" in str(run_plan(*size, "--gpus", "2").exception)


def test_json_has_every_term(folder: str) -> None:
    done = run_plan("--set", f"model.path={folder}", "--gpus", "8", "--gpu-gb", "85.5", "--json")
    plan = json.loads(done.output)
    assert plan["fits"] is True
    assert plan["parameters"] == {"policy": 7_615_616_512}
    rest = next(phase for phase in plan["phases"] if phase["name"] == "learner at rest")
    assert rest["terms"]["policy: AdamW"] == 7_615_616_512
    assert rest["bytes"] == sum(rest["terms"].values())


def test_a_model_that_is_not_there_and_half_a_cluster_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = run_plan("--set", "model.path=nobody/nothing", "--gpus", "8", "--gpu-gb", "85.5")
    assert "model.path nobody/nothing" in str(missing.exception)
    half = run_plan("--gpus", "8")
    assert "--gpus N and --gpu-gb M go together" in str(half.exception)


def test_the_config_comes_from_the_hubs_cache_without_a_network_or_torch(tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--lab--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(CONFIGS["1.5B"]))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import sys\n"
        "from rltrain.model_files import config_file\n"
        "print(config_file('lab/model', None), config_file('lab/other', None), 'torch' in sys.modules)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    file, missing, with_torch = done.stdout.split()
    assert Path(file).name == "config.json"
    assert (missing, with_torch) == ("None", "False")


def test_the_page_of_plans_is_up_to_date() -> None:
    done = run_program(["scripts/plan_table.py", "--check"])
    assert done.returncode == 0, done.stderr


def test_every_recipe_says_the_smallest_cluster_that_it_fits() -> None:
    table = script("plan_table")
    stated = 0
    for folder_name in table.FOLDERS:
        for path, load in table.recipes_in(folder_name):
            lines = path.read_text(encoding="utf-8").splitlines()
            [line] = [line for line in lines if line.startswith(table.STATEMENT)]
            assert line == table.statement_of(load), f"{path}: run scripts/plan_table.py"
            stated += 1
    assert stated > 60
    # a plan that counts other bytes says something else
    _, load = next(table.recipes_in("policy"))
    assert table.statement_of(replace(load, tokens=64 * load.tokens)) != table.statement_of(load)


def test_the_page_of_plans_has_every_recipe() -> None:
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    for folder_name in ("policy", "preference", "process_reward", "supervised"):
        for path in (ROOT / "recipes" / folder_name).glob("*.yaml"):
            assert f"| {path.stem} |" in page or f"`{folder_name}/{path.stem}`" in page, path


def terms_of(load: Workload, where: Cluster, phase: str) -> dict[str, int]:
    [chosen] = [item for item in phases_of(load, where) if item.name == phase]
    return {term.name: term.bytes for term in chosen.terms}


def test_what_is_offloaded_is_on_the_host_and_not_on_the_gpu() -> None:
    load = workload("policy/clip_cov", "7B")
    eight = cluster(8, Backend.zero3)
    at_work = terms_of(load, eight, "learner at rest")
    for offload, left in (("optimizer", {"policy: weights"}), ("all", set())):
        moved = replace(load, offload=offload)
        assert {
            name for name in terms_of(moved, eight, "learner at rest") if name.startswith("policy")
        } == left
        host = terms_of(moved, eight, "offloaded, on the host")
        for name in ("policy: masters", "policy: AdamW"):
            assert host[name] == 8 * at_work[name]
        assert "policy: gradient" in host and "policy: gradient" not in terms_of(moved, eight, "update")
    ddp = cluster(8, Backend.ddp)  # which can offload nothing
    assert phases_of(replace(load, offload="all"), ddp) == phases_of(load, ddp)


def test_ranks_of_one_engine_divide_its_weights_and_its_cache() -> None:
    load = workload("policy/clip_cov", "7B")
    eight = cluster(8, Backend.fsdp2)
    assert load.engine is not None
    together = replace(load, engine=replace(load.engine, ranks=2))
    row, shared = (terms_of(item, eight, "one row in the engine") for item in (load, together))
    for name in ("engine: weights", "cache of one longest row"):
        assert shared[name] == row[name] // 2
    assert cache_tokens(together, eight) > 2 * cache_tokens(load, eight)


def test_a_step_that_samples_while_it_learns_takes_the_slower_one(folder: str) -> None:
    size = ("--set", f"model.path={folder}", "--gpu-gb", "85.5", "--gpus", "8", *SERVER)
    workers = ("--set", "rollout.workers={count: 2}")
    taken_in_turn = json.loads(run_plan(*size, *workers, "--json").output)
    seconds = {each["phase"]: each["seconds"] for each in taken_in_turn["durations"]}
    assert (taken_in_turn["gpus"], taken_in_turn["server_gpus"]) == (4, 4)
    assert taken_in_turn["step_seconds"] == pytest.approx(sum(seconds.values()))
    lag = ("--set", "rollout.schedule={lag: 1}")
    plan = json.loads(run_plan(*size, *workers, *lag, "--json").output)
    slower = max(seconds["rollout"], seconds["annotate"] + seconds["update"])
    assert plan["overlaps"] and plan["step_seconds"] == pytest.approx(slower + seconds["push"])
    assert plan["bottleneck"] == ("rollout" if slower == seconds["rollout"] else "update")
    assert plan["split"]["gpus"] + plan["split"]["server_gpus"] == 8
    assert plan["split"]["server_gpus"] % 2 == 0
    assert plan["split"]["step_seconds"] <= plan["step_seconds"]
    for count in (1, 2, 3):
        other = run_plan(*size, "--set", f"rollout.workers={{count: {count}}}", *lag, "--json")
        assert json.loads(other.output)["split"] == plan["split"]  # of the same GPUs
    output = run_plan(*size, *workers, *lag).output
    assert "sampling and learning go on at once" in output
    assert f"best split of 8 GPUs: {plan['split']['gpus']} learn" in output

    # a bound has one learner rank; with more it takes turns in the plan, and is refused at the start
    keys = ("rollout.schedule={bounded: {versions: 1}}", "rollout.dynamic_sampling=null")
    settings = [word for key in keys for word in ("--set", key)]
    bound = json.loads(run_plan(*size, *workers, *settings, "--json").output)
    assert not bound["overlaps"] and bound["split"] is None  # one GPU does not hold this learner
    urls = run_plan(
        *size, "--set", "rollout.workers={urls: ['http://a:1', 'http://b:1', 'http://c:1']}", "--json"
    )
    elsewhere = json.loads(urls.output)
    assert (elsewhere["gpus"], elsewhere["server_gpus"], elsewhere["split"]) == (8, 6, None)
