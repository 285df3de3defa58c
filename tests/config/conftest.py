from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MINIMAL = """\
model: {path: tiny}
data: {train: arithmetic, eval: arithmetic, max_prompt_tokens: 16}
rollout: {prompts: 24, n: 8, max_tokens: 8}
reward: {functions: [math_answer]}
advantage: group_norm
loss: {policy: clip}
learner: {optimizer: {lr: 1e-4}}
train: {steps: 200}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file in the test's folder; without text, a recipe with only the required keys."""

    def writer(name: str = "recipe.yaml", text: str = MINIMAL) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return writer


@pytest.fixture
def recipe(write: Callable[..., Path]) -> Path:
    return write()
