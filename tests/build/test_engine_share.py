"""vLLM's share of a GPU where a recipe leaves it open."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rltrain.build import engine_share, recomputation
from rltrain.build.engine_share import agree_on_share, rollout_alone, rollout_beside
from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.load import load_recipe
from rltrain.config.schema import OnlineRecipe
from support.scripts import script

H100 = Cluster(8, 85_500_000_000, Backend.fsdp2)


@pytest.fixture
def recipe(tmp_path: Path) -> OnlineRecipe:
    """Clip-Cov with the config of its 7B model on this machine."""
    config = script("model_shapes").PUBLISHED["Qwen/Qwen2.5-7B"].config
    facts = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    loaded = load_recipe("clip_cov", overrides=(f"model.path={tmp_path}",))
    assert isinstance(loaded, OnlineRecipe)
    return loaded


def trained_on(device: str, shares: list[float]) -> Any:
    """What ``rollout_beside`` reads of a model that eight ranks train."""
    return SimpleNamespace(
        device=torch.device(device),
        world_size=8,
        accelerator=None,
        gather=lambda share: [*share, *shares],
    )


def test_the_share_is_the_plans_and_no_more_than_is_free(recipe: OnlineRecipe) -> None:
    planned = agree_on_share(recipe, H100, free=80_000_000_000)
    assert 0.7 < planned < 0.8  # 85.5 GB without 12 N / 8 = 11.4, two tensors of 4.4, 3 % and 3.0 outside
    assert agree_on_share(recipe, H100, free=40_000_000_000) == 0.46
    unknown = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "nobody/nothing"})})
    assert agree_on_share(unknown, H100, free=80_000_000_000) == 0.45


def test_every_rank_takes_the_least_of_all(recipe: OnlineRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_share, "backend_name", lambda accelerator: "fsdp2")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80_000_000_000, 85_500_000_000))
    rollout = rollout_beside(recipe, trained_on("cuda:0", [0.61, 0.66]))
    assert rollout.vllm.gpu_memory_utilization == 0.61
    assert rollout_beside(recipe, trained_on("cpu", [0.1])) is recipe.rollout
    stated = load_recipe("clip_cov", overrides=("rollout.vllm.gpu_memory_utilization=0.5",))
    assert isinstance(stated, OnlineRecipe)
    assert rollout_beside(stated, trained_on("cuda:0", [0.1])) is stated.rollout


def test_without_a_learner_vllm_shares_with_reward_models_only(recipe: OnlineRecipe) -> None:
    assert rollout_alone(recipe).vllm.gpu_memory_utilization == 0.9
    scored = load_recipe("grpo_reward_model")
    assert isinstance(scored, OnlineRecipe)
    assert rollout_alone(scored).vllm.gpu_memory_utilization == 0.45


def test_recomputed_layers_are_the_plans_on_a_gpu(
    recipe: OnlineRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recomputation, "backend_name", lambda accelerator: "fsdp2")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80_000_000_000, 85_500_000_000))
    learner = recipe.learner.model_copy(update={"gradient_checkpointing": "auto"})
    auto = recipe.model_copy(update={"learner": learner})
    shares: list[float] = []

    def train_on(device: str) -> Any:
        trained = trained_on(device, [])
        trained.recompute = shares.append
        return trained

    recomputation.recompute_what_must_be(auto, [train_on("cpu")])
    recomputation.recompute_what_must_be(recipe, [train_on("cuda:0")])
    assert shares == []
    recomputation.recompute_what_must_be(auto, [train_on("cuda:0"), train_on("cuda:0")])
    assert shares == [recomputation.recomputed_share(auto, H100)] * 2 and 0 < shares[0] < 1
    unknown = auto.model_copy(update={"model": recipe.model.model_copy(update={"path": "nobody/nothing"})})
    assert recomputation.recomputed_share(unknown, H100) == 1.0
