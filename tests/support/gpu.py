"""The condition under which tests of a GPU run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA GPU: this checks what only one can show"
)
NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed (pip install rltrain[vllm])"
)
