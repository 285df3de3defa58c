"""Weights gathered in the engine's precision are the masters rounded, and their norms tell an update without
a gather; two processes under mixed precision.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import launch_ranks

SCRIPT = Path(__file__).with_name("two_ranks_weights.py")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_shards_are_rounded_before_they_are_gathered(
    backend: str, random_tied_model: str, tmp_path: Path
) -> None:
    for result in launch_ranks(SCRIPT, backend, random_tied_model, tmp_path):
        assert result["rounded_at_start"] == []  # masters are the folder's float32 weights
        assert result["exact"] == ["torch.float32"]
        assert result["rounded"] == ["torch.bfloat16"]
        assert result["differing"] == []
        assert result["shards"] < 1e-13  # summed where they are, in either precision
        assert result["unchanged"] and result["still"] == []
        assert result["ratios"] == [1.0]  # each master is on one rank, whole or in parts
