"""What a method declares: ``@method`` above its function, and the types of its hyperparameters."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter

F = TypeVar("F")

_TENSOR_OR_NONE = re.compile(r"(torch\.)?Tensor \| None|(typing\.)?Optional\[(torch\.)?Tensor\]")
DECLARATION = "method_declaration"  # the attribute of a declared function or class


@dataclass(frozen=True)
class Declaration:
    """The arguments of ``@method``."""

    name: str
    arxiv: str | None
    needs: frozenset[str]
    needs_if: Mapping[str, frozenset[str]]
    traits: frozenset[str]
    refuses: Mapping[str, Mapping[str, str]]
    check: str  # a function beside the method; empty: there is none


Check = Callable[[Mapping[str, Any], Any], Iterator[str]]


def method(
    name: str,
    *,
    arxiv: str | None = None,
    needs: frozenset[str] | set[str] = frozenset(),
    needs_if: Mapping[str, set[str]] | None = None,
    traits: set[str] = frozenset(),  # type: ignore[assignment]
    refuses: Mapping[str, Mapping[str, str]] | None = None,
    check: Check | None = None,
) -> Callable[[F], F]:
    """Declares a method. In a package all arguments must be literals or constants of ``rltrain/needs.py``,
    because they are read from source.

    needs: what the learner must compute for it (``OLD_LOGP``, ``REF_LOGP``, ``ENTROPY_GRAD``, ...), constants
    of ``rltrain/needs.py`` or their texts; a hyperparameter in braces is replaced by its value
    (``CLAMPED_ENTROPY("{share}")``). needs_if: the same, but only if the named hyperparameter is neither 0
    nor None, or has the value in "name=value". traits: facts that ``config/rules`` uses in its rules
    (``OWNS_CLIPPING``, ``OFF_POLICY_ONLY``, ...). refuses: for each hyperparameter, values that users may try
    but that must not be used, with the reason for the error message. check: a rule about this method alone, a
    function of the same file, ``(values, recipe) -> Iterator[str]``, that yields what is wrong with the
    hyperparameters ``values`` (defaults included) in this recipe. The function keeps the declaration as its
    attribute ``method_declaration``.
    """
    facts = {"arxiv": arxiv, "needs": needs, "needs_if": needs_if, "traits": traits, "refuses": refuses}
    declaration = declare(name, {**facts, "check": check and check.__name__})

    def keep_declaration(function: F) -> F:
        setattr(function, DECLARATION, declaration)
        return function

    return keep_declaration


def declare(name: str, facts: Mapping[str | None, Any]) -> Declaration:
    """The declaration with the keyword arguments ``facts`` of ``@method``."""
    return Declaration(
        name=name,
        arxiv=facts.get("arxiv"),
        needs=frozenset(map(str, facts.get("needs") or ())),
        needs_if={key: frozenset(map(str, names)) for key, names in (facts.get("needs_if") or {}).items()},
        traits=frozenset(map(str, facts.get("traits") or ())),
        refuses=facts.get("refuses") or {},
        check=facts.get("check") or "",
    )


@dataclass(frozen=True)
class Hyperparameter:
    annotation: str
    default: Any
    # the type itself, for a user's own function; None: ``annotation`` names types of Python's own
    type: Any = None

    def adapter(self) -> TypeAdapter[Any]:
        return _type_adapter(self.annotation) if self.type is None else _adapter_of(self.type)


@dataclass(frozen=True)
class MethodSpec(Declaration):
    """A declaration with the signature of its function, as read from source."""

    module: str  # a module's name, or the path of a user's file
    attribute: str
    hyperparameters: Mapping[str, Hyperparameter]
    positional: tuple[str, ...]  # arguments that the stage supplies by position
    inputs: tuple[str, ...]  # keyword-only tensors
    doc: str
    package: str = ""  # name and version of the installed package that brings it; empty: none does

    def values_with(self, hp: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters, those not in ``hp`` with their defaults."""
        return {key: parameter.default for key, parameter in self.hyperparameters.items()} | dict(hp)

    def needs_with(self, hp: Mapping[str, Any]) -> frozenset[str]:
        """Everything the method needs under these hyperparameters."""
        values = self.values_with(hp)
        extra = (names for condition, names in self.needs_if.items() if _is_condition_met(condition, values))
        return frozenset(name.format(**values) for name in self.needs.union(*extra))


def _is_condition_met(condition: str, values: Mapping[str, Any]) -> bool:
    """Whether the hyperparameter of the condition "name" is neither 0 nor None, or that of "name=value" has
    that value.
    """
    name, equals, value = condition.partition("=")
    return str(values[name]) == value if equals else values[name] not in (0, None)


def is_tensor_or_none(annotation: str) -> bool:
    """Whether a keyword of this type is an input of the stage rather than a hyperparameter."""
    return _TENSOR_OR_NONE.fullmatch(annotation) is not None


@functools.cache
def _type_adapter(annotation: str) -> TypeAdapter[Any]:
    names = {
        "Literal": Literal,
        "float": float,
        "int": int,
        "bool": bool,
        "str": str,
        "list": list,
        "tuple": tuple,
        "dict": dict,
    }
    # The annotation comes from this package's source and names literal types only.
    return _adapter_of(eval(annotation, {"__builtins__": {}}, {**names, "None": None}))


def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))
