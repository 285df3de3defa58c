"""Which methods go together. Every rule follows from what the methods declare of themselves (traits); no name
stands here.

policy_loss:X           a control made for the loss X, which owns the clipping rule, or an advantage that is
                        right under it only
control:X               a policy loss that reads what the control X leaves in the batch
same_as_policy_loss:H   a control's hyperparameter H is the policy loss's
aggregate:X             a control or an advantage that is exact under the aggregate X only
token_level             a control whose weights tell the tokens of a row apart
sequence_level          a policy loss with one ratio per row
fraction:H              a hyperparameter that is a share, above 0 and at most 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.registry import MethodSpec

__all__ = ["MethodUse", "Methods", "composition_problems"]


@dataclass(frozen=True)
class MethodUse:
    """A method as a recipe uses it. ``values``: its hyperparameters, defaults included."""

    key: str  # where it stands: loss.policy, control.0, ...
    spec: MethodSpec
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.spec.name

    def __str__(self) -> str:
        return f"{self.key} {self.name}"

    def has(self, trait: str) -> bool:
        return trait in self.spec.traits

    def arguments(self, trait: str) -> list[str]:
        """X of every trait "<trait>:X" that it declares."""
        return sorted(
            one.removeprefix(f"{trait}:") for one in self.spec.traits if one.startswith(f"{trait}:")
        )


@dataclass(frozen=True)
class Methods:
    advantage: MethodUse
    controls: tuple[MethodUse, ...]
    policy: MethodUse
    terms: tuple[MethodUse, ...]
    aggregate: MethodUse
    rewards: tuple[MethodUse, ...]  # the user's own are not among them
    sources: tuple[MethodUse, ...]


def composition_problems(methods: Methods) -> Iterator[str]:
    """Why these methods cannot work together, one line each, with the remedy."""
    yield from _companions(methods)
    yield from _of_the_advantage(methods)
    yield from _levels(methods)
    yield from _repetitions(methods)
    yield from _fractions(methods)


def _companions(methods: Methods) -> Iterator[str]:
    """A control and the policy loss it is made for: there is one loss, so at most one owner of the
    clipping rule.
    """
    policy = methods.policy
    owners = [
        (control, wanted) for control in methods.controls for wanted in control.arguments("policy_loss")
    ]
    if len({wanted for _, wanted in owners}) > 1:
        names = " and ".join(f"{control} (with loss.policy {wanted})" for control, wanted in owners)
        yield (
            f"{names} each bring their own rule of clipping, and a recipe has one policy loss; keep one of "
            "them"
        )
        return
    for control, wanted in owners:
        if wanted != policy.name:
            yield (
                f"{control} is made for loss.policy {wanted}, which is {policy.name}; set loss.policy to "
                f"{wanted} or drop {control.key}"
            )
            continue
        for name in control.arguments("same_as_policy_loss"):
            if control.values[name] != policy.values[name]:
                yield (
                    f"{control} has {name} {control.values[name]:g} and {policy} has "
                    f"{policy.values[name]:g}: the control must know "
                    f"what the loss clips; write the same {name} at both"
                )
    names = [control.name for control in methods.controls]
    for wanted in policy.arguments("control"):
        if wanted not in names:
            yield (
                f"{policy} reads what the control {wanted} computes, which control lacks; add {wanted} to "
                "control"
            )


def _of_the_advantage(methods: Methods) -> Iterator[str]:
    """An advantage that is one half of an objective: the loss and the aggregate that make the other."""
    for kind, chosen in (("policy_loss", methods.policy), ("aggregate", methods.aggregate)):
        for wanted in methods.advantage.arguments(kind):
            if wanted != chosen.name:
                yield (
                    f"{methods.advantage} is the paper's objective under {chosen.key} {wanted} only, which "
                    f"is {chosen.name}; "
                    f"set {chosen.key} to {wanted} or choose another advantage"
                )


def _levels(methods: Methods) -> Iterator[str]:
    for control in methods.controls:
        if control.has("token_level") and methods.policy.has("sequence_level"):
            yield (
                f"{control} weighs tokens, but {methods.policy} has one ratio per sequence that mixes them: "
                "each weight would scale a "
                f"share of the whole row; set loss.policy to a token-level loss (clip) or drop {control.key}"
            )
        for wanted in control.arguments("aggregate"):
            if methods.aggregate.name != wanted:
                yield (
                    f"{control} gives each part of the loss its own denominator, which is exact under "
                    f"{wanted} only, but loss.aggregate is "
                    f"{methods.aggregate.name}; set loss.aggregate to {wanted}"
                )


def _repetitions(methods: Methods) -> Iterator[str]:
    for kind in (methods.controls, methods.terms):
        first: dict[str, MethodUse] = {}
        for one in kind:
            if first.setdefault(one.name, one) is not one:
                yield (
                    f"{one} repeats {first[one.name].key}: it would act twice and its metrics could not be "
                    "told apart; keep one of them"
                )


def _fractions(methods: Methods) -> Iterator[str]:
    for one in (methods.advantage, *methods.controls, methods.policy, *methods.terms, *methods.sources):
        for name in one.arguments("fraction"):
            if not 0 < one.values[name] <= 1:
                yield (
                    f"{one}: {name} is {one.values[name]:g}, but it is a share, above 0 and at most 1 (0.2 "
                    "percent is 0.002)"
                )
