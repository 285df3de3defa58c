"""rltrain post-trains language models with reinforcement learning. See README.md.

The names of ``dir(rltrain)`` are imported when they are first used, so that importing the package costs
nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "load_recipe": "rltrain.config.load",
    "evaluate": "rltrain.cli.api",
    "train_recipe": "rltrain.cli.api",
    "method": "rltrain.declaration",
    **dict.fromkeys(
        ("Prompt", "Completion", "RolloutGroup", "ScoredGroup", "Sampling"), "rltrain.types.samples"
    ),
    **dict.fromkeys(("TrainBatch", "PolicyTokens", "TokenLoss", "StepTotals"), "rltrain.types.policy"),
    **dict.fromkeys(
        ("PairBatch", "LabelBatch", "PolicyPairs", "ExampleLoss", "ExampleTotals"),
        "rltrain.types.preference",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "train":  # a package that can be called
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'rltrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, "train"])
