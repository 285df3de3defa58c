"""Advantage estimators: ``(rewards (B,), group (B,), *, hp) -> (B,)``, or (B, T) for one per token."""

from rltrain.registry import Registry

ADVANTAGES = Registry(
    "advantage",
    modules=(
        "rltrain.advantage.group",
        "rltrain.advantage.baselines",
        "rltrain.advantage.decoupled",
        "rltrain.advantage.entropy_shaped",
        "rltrain.advantage.token_average",
        "rltrain.advantage.reference",
        "rltrain.advantage.ares",
        "rltrain.advantage.process",
        "rltrain.advantage.target",
        "rltrain.advantage.best_of_n",
        "rltrain.advantage.none",
    ),
)
