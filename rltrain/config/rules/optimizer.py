"""Rules about an optimizer's settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from rltrain.config.schema import Optimizer


def optimizer_problems(key: str, settings: Optimizer) -> Iterator[str]:
    """key: of the settings in the recipe."""
    if settings.name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        yield (
            f"{key}.name is adamw_8bit, and bitsandbytes is not installed; pip install "
            "'bitsandbytes>=0.50', or set it to adamw"
        )
    if settings.schedule == "constant" and settings.min_lr_ratio > 0:
        yield (
            f"{key}.min_lr_ratio is {settings.min_lr_ratio:g}, but {key}.schedule is constant, which never "
            "falls to it; set the schedule to linear or cosine, or drop min_lr_ratio"
        )
