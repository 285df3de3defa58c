"""What tests share: tiny models made once per session, never downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """scripts/make_tiny_model.py as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_model", ROOT / "scripts" / "make_tiny_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def random_model(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model with an output head of its own."""
    return str(tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "untied", tied=False, seed=0))


@pytest.fixture(scope="session")
def random_tied_model(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "tied", tied=True, seed=0))
