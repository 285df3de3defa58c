"""Modules with methods and rewards that installed packages bring, by entry points of the group
``rltrain.methods``:

    [project.entry-points."rltrain.methods"]
    policy_loss = "my_package.losses"
    "reward.spelling" = "my_package.spelling"

The name of an entry point is a kind of method, and anything after a dot; its value is a module.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

GROUP = "rltrain.methods"
KINDS = (
    "advantage",
    "control",
    "policy_loss",
    "loss_term",
    "aggregate",
    "coefficient",
    "preference_loss",
    "reward",
    "judge",
    "extra_sample",
    "prompt_order",
    "environment",
)


@dataclass(frozen=True)
class InstalledModule:
    kind: str  # one of KINDS, unless the package's author has misspelt it
    module: str
    package: str  # name and version, as in "my-methods 1.2"


@functools.cache
def installed_modules() -> tuple[InstalledModule, ...]:
    """Every module that an installed package offers, in the order of packages and names."""
    modules = [
        InstalledModule(
            point.name.partition(".")[0],
            point.value,
            f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed package",
        )
        for point in importlib.metadata.entry_points(group=GROUP)
    ]
    return tuple(sorted(modules, key=lambda entry: (entry.package, entry.kind, entry.module)))


def installed_modules_of(kind: str) -> list[InstalledModule]:
    """kind: one of KINDS."""
    return [entry for entry in installed_modules() if entry.kind == kind]
