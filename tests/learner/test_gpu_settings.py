"""What ranks ask of torch before they use a GPU, and what DDP holds."""

from __future__ import annotations

import os

import pytest
import torch

from rltrain.learner.ranks import connect, make_accelerator
from rltrain.rollout.engines.vllm.process import unchanged_process

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def test_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    connect(60.0)
    assert os.environ[NAMES[0]] == "expandable_segments:True"
    monkeypatch.delenv(NAMES[0])
    monkeypatch.setenv(NAMES[1], "max_split_size_mb:512")
    connect(60.0)
    assert NAMES[0] not in os.environ and os.environ[NAMES[1]] == "max_split_size_mb:512"


def test_ddps_gradients_are_views_of_its_buckets() -> None:
    accelerator = make_accelerator("no")
    assert accelerator.ddp_handler.to_kwargs() == {"gradient_as_bucket_view": True}


def test_vllms_precision_of_float32_products_does_not_stay() -> None:
    before = torch.get_float32_matmul_precision()
    with unchanged_process():
        torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
    assert torch.get_float32_matmul_precision() == before
