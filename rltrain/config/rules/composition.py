"""Checks which methods can be combined. Every rule follows from traits that the methods declare, never from
their names.

policy_loss:X           a control made for the loss X, which defines the clipping rule, or an advantage that
                        is correct under X only
control:X               a policy loss that reads what the control X writes into the batch
same_as_policy_loss:H   a control's hyperparameter H must equal that of the policy loss
aggregate:X             a control or an advantage that is exact under the aggregate X only
token_level             a control that gives the tokens of a row different weights
sequence_level          a policy loss with one ratio per row
fraction:H              hyperparameter H is a share, above 0 and at most 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.needs import (
    AGGREGATE,
    CONTROL,
    FRACTION,
    POLICY_LOSS,
    SAME_AS_POLICY_LOSS,
    SEQUENCE_LEVEL,
    TOKEN_LEVEL,
)
from rltrain.registry import MethodSpec

__all__ = ["MethodUse", "Methods", "composition_problems"]


@dataclass(frozen=True)
class MethodUse:
    """A method as a recipe uses it. ``values``: its hyperparameters, defaults included."""

    key: str  # its recipe key: loss.policy, control.0, ...
    spec: MethodSpec
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.spec.name

    def __str__(self) -> str:
        """Key and name, for messages; and the file of a user's method."""
        is_own = self.spec.module.endswith(".py")
        return f"{self.key} {self.name}{f' ({self.spec.module})' if is_own else ''}"

    def has(self, trait: str) -> bool:
        return trait in self.spec.traits

    def arguments(self, trait: str) -> list[str]:
        """X of every trait "<trait>:X" that the method declares."""
        prefix = f"{trait}:"
        return sorted(
            declared.removeprefix(prefix) for declared in self.spec.traits if declared.startswith(prefix)
        )


@dataclass(frozen=True)
class Methods:
    advantage: MethodUse
    controls: tuple[MethodUse, ...]
    policy: MethodUse
    terms: tuple[MethodUse, ...]
    aggregate: MethodUse
    rewards: tuple[MethodUse, ...]  # without the user's own functions
    sources: tuple[MethodUse, ...]


def composition_problems(methods: Methods) -> Iterator[str]:
    """The reasons why these methods cannot be combined, one line each, with the remedy."""
    yield from _companion_problems(methods)
    yield from _advantage_problems(methods)
    yield from _level_problems(methods)
    yield from _repetition_problems(methods)
    yield from _fraction_problems(methods)


def _companion_problems(methods: Methods) -> Iterator[str]:
    """Checks each control against the policy loss it is made for. There is one loss, so at most one control
    may define the clipping rule.
    """
    policy = methods.policy
    owners = [
        (control, loss_name) for control in methods.controls for loss_name in control.arguments(POLICY_LOSS)
    ]
    if len({loss_name for _, loss_name in owners}) > 1:
        names = " and ".join(f"{control} (with loss.policy {loss_name})" for control, loss_name in owners)
        yield f"{names} each define a clipping rule, but a recipe has one policy loss; keep one of them"
        return

    for control, loss_name in owners:
        if loss_name != policy.name:
            yield (
                f"{control} is made for loss.policy {loss_name}, which is {policy.name}; set loss.policy to "
                f"{loss_name} or drop {control.key}"
            )
            continue
        for name in control.arguments(SAME_AS_POLICY_LOSS):
            if control.values[name] != policy.values[name]:
                yield (
                    f"{control} has {name} {control.values[name]:g} and {policy} has "
                    f"{policy.values[name]:g}: the control must use the clipping range of the loss; write "
                    f"the same {name} at both"
                )

    names = [control.name for control in methods.controls]
    for control_name in policy.arguments(CONTROL):
        if control_name not in names:
            yield (
                f"{policy} reads what the control {control_name} computes, but control does not list it; add "
                f"{control_name} to control"
            )


def _advantage_problems(methods: Methods) -> Iterator[str]:
    """Checks an advantage that is half of an objective against the loss and aggregate of the other half."""
    for kind, method in (("policy_loss", methods.policy), ("aggregate", methods.aggregate)):
        for required in methods.advantage.arguments(kind):
            if required != method.name:
                yield (
                    f"{methods.advantage} is the paper's objective under {method.key} {required} only, which "
                    f"is {method.name}; set {method.key} to {required} or choose another advantage"
                )


def _level_problems(methods: Methods) -> Iterator[str]:
    for control in methods.controls:
        if control.has(TOKEN_LEVEL) and methods.policy.has(SEQUENCE_LEVEL):
            yield (
                f"{control} weighs tokens, but {methods.policy} has one ratio per sequence that mixes them: "
                "each weight would scale a share of the whole row; set loss.policy to a token-level loss "
                f"(clip) or drop {control.key}"
            )
        for aggregate in control.arguments(AGGREGATE):
            if methods.aggregate.name != aggregate:
                yield (
                    f"{control} gives each part of the loss its own denominator, which is exact under "
                    f"{aggregate} only, but loss.aggregate is {methods.aggregate.name}; set loss.aggregate "
                    f"to {aggregate}"
                )


def _repetition_problems(methods: Methods) -> Iterator[str]:
    for methods_of_kind in (methods.controls, methods.terms):
        first: dict[str, MethodUse] = {}
        for method in methods_of_kind:
            if first.setdefault(method.name, method) is not method:
                yield (
                    f"{method} repeats {first[method.name].key}: it would act twice and its metrics could "
                    "not be told apart; keep one of them"
                )


def _fraction_problems(methods: Methods) -> Iterator[str]:
    for method in (methods.advantage, *methods.controls, methods.policy, *methods.terms, *methods.sources):
        for name in method.arguments(FRACTION):
            if not 0 < method.values[name] <= 1:
                yield (
                    f"{method}: {name} is {method.values[name]:g}, but it is a share, above 0 and at most 1 "
                    "(0.2 percent is 0.002)"
                )
