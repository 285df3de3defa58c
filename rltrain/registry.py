"""Registries map names to functions and check hyperparameters before any model is loaded.

A method is a function (or a controller class) with a ``@method("name", ...)`` decorator. A registry lists its
modules and reads their declarations from source, so that recipes are validated without importing torch;
``bind`` imports only the module of that method. Keyword-only parameters with a default are hyperparameters,
and a default is stated in the signature only. Keyword-only parameters without a default, and those of type
``Tensor | None``, are inputs that the caller supplies; they are named in ``needs`` or ``needs_if``.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

F = TypeVar("F")

# Hyperparameters that are scales, widths, weights, counts or limits in every method that has them.
_NOT_NEGATIVE = frozenset(
    {
        "alpha1",
        "alpha2",
        "beta",
        "beta1",
        "beta2",
        "cap",
        "dual_clip",
        "eps",
        "eps_high",
        "eps_low",
        "eta",
        "kl_coef",
        "max_weight",
        "noise",
        "sft_weight",
        "sigma",
        "tau",
        "temperature",
        "warmup_steps",
        "weight_desirable",
        "weight_undesirable",
    }
)
# Counts and limits of which none is useless.
_POSITIVE = frozenset(
    {
        "concurrency",
        "every",
        "file_mib",
        "max_tests",
        "max_tokens",
        "memory_mib",
        "message_mib",
        "n",
        "output_mib",
        "processes",
        "rounds",
        "seconds",
        "top_k",
        "total_seconds",
        "window",
    }
)
# Shares, probabilities and quantiles that may be 0 (those above 0 have the trait "fraction:NAME").
_SHARES = frozenset({"flip_rate", "min_share", "quantile", "rho", "sft_share"})


def method(
    name: str,
    *,
    arxiv: str | None = None,
    needs: frozenset[str] | set[str] = frozenset(),
    needs_if: Mapping[str, set[str]] | None = None,
    traits: set[str] = frozenset(),  # type: ignore[assignment]
    refuses: Mapping[str, Mapping[str, str]] | None = None,
) -> Callable[[F], F]:
    """Declares a method. All arguments must be literals, because they are read from source.

    needs: what the learner must compute for it ("old_logp", "ref_logp", "old_entropy", "logp_now",
    "entropy_grad", ...); a hyperparameter in braces is replaced by its value ("clamped_entropy:{share}").
    needs_if: the same, but only if the named hyperparameter is neither 0 nor None, or has the value in
    "name=value". traits: facts that ``config/check.py`` uses in its rules ("owns_clipping",
    "off_policy_only", "sequence_level", ...). refuses: for each hyperparameter, values that users may try but
    that must not be used, with the reason for the error message.
    """
    del name, arxiv, needs, needs_if, traits, refuses
    return lambda function: function


@dataclass(frozen=True)
class Hyperparameter:
    annotation: str
    default: Any


@dataclass(frozen=True)
class MethodSpec:
    """A declaration as read from source."""

    name: str
    module: str
    attribute: str
    arxiv: str | None
    needs: frozenset[str]
    needs_if: Mapping[str, frozenset[str]]
    traits: frozenset[str]
    hyperparameters: Mapping[str, Hyperparameter]
    inputs: tuple[str, ...]  # keyword-only tensors
    refuses: Mapping[str, Mapping[str, str]]
    doc: str

    def needs_with(self, hp: Mapping[str, Any]) -> frozenset[str]:
        """Everything the method needs under these hyperparameters."""
        values = {key: parameter.default for key, parameter in self.hyperparameters.items()} | dict(hp)
        extra = (names for condition, names in self.needs_if.items() if _is_condition_met(condition, values))
        return frozenset(name.format(**values) for name in self.needs.union(*extra))


@dataclass(frozen=True)
class BoundMethod:
    """A method with its hyperparameters; call it with the tensors that its stage supplies."""

    spec: MethodSpec
    hp: Mapping[str, Any]
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def needs(self) -> frozenset[str]:
        return self.spec.needs_with(self.hp)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Registry:
    """The methods of one kind.

    ``modules`` lists where they are declared, in reading order; importing a module registers nothing.
    """

    def __init__(self, kind: str, modules: tuple[str, ...], decorator: str = "method") -> None:
        self.kind = kind
        self.modules = modules
        self.decorator = decorator

    @functools.cached_property
    def specs(self) -> dict[str, MethodSpec]:
        specs: dict[str, MethodSpec] = {}
        for module in self.modules:
            for spec in _read_declarations(module, self.decorator):
                if spec.name in specs:
                    raise ValueError(
                        f"{self.kind} {spec.name!r} is declared in {specs[spec.name].module} and {module}"
                    )
                specs[spec.name] = spec
        return specs

    def names(self) -> list[str]:
        return list(self.specs)

    def spec(self, name: str) -> MethodSpec:
        if name not in self.specs:
            raise ValueError(f"no {self.kind} is called {name!r}{suggestion(name, self.specs)}")
        return self.specs[name]

    def check(self, name: str, hp: Mapping[str, Any]) -> MethodSpec:
        """Checks names and types of ``hp`` against the signature, without importing the method.

        Raises ValueError if one does not fit.
        """
        spec = self.spec(name)
        for key, value in hp.items():
            if key not in spec.hyperparameters:
                raise ValueError(
                    f"{self.kind} {name!r} has no hyperparameter "
                    f"{key!r}{suggestion(key, spec.hyperparameters)}"
                )
            annotation = spec.hyperparameters[key].annotation
            try:
                _type_adapter(annotation).validate_python(value)
            except ValidationError as error:
                reason = spec.refuses.get(key, {}).get(str(value), error.errors()[0]["msg"])
                raise ValueError(
                    f"{self.kind} {name!r}: {key} must be {annotation}, got {value!r} "
                    f"({type(value).__name__}): {reason}"
                ) from error
            if (expected := _expected_range(key, value)) is not None:
                raise ValueError(f"{self.kind} {name!r}: {key} is {value:g}; it must be {expected}")
        return spec

    def bind(self, name: str, hp: Mapping[str, Any] | None = None) -> BoundMethod:
        """The method with ``hp`` applied. Raises ValueError for an unknown name or key, or a wrong type."""
        hp = dict(hp or {})
        spec = self.check(name, hp)
        function = getattr(importlib.import_module(spec.module), spec.attribute)
        return BoundMethod(spec, hp, functools.partial(function, **hp))


def suggestion(word: str, choices: Any) -> str:
    """'; did you mean ...' for the closest of ``choices``, or the list of them if none is close."""
    names = sorted(map(str, choices))
    matches = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; choose from {', '.join(names)}" if names else ""


def _is_condition_met(condition: str, values: Mapping[str, Any]) -> bool:
    """Whether the hyperparameter of the condition "name" is neither 0 nor None, or that of "name=value" has
    that value.
    """
    name, equals, value = condition.partition("=")
    return str(values[name]) == value if equals else values[name] not in (0, None)


def _expected_range(key: str, value: Any) -> str | None:
    """The range of the hyperparameter ``key``, in words, if ``value`` is a number outside it."""
    if not isinstance(value, int | float):
        return None
    if key in _NOT_NEGATIVE and value < 0:
        return "at least 0"
    if key in _POSITIVE and value <= 0:
        return "above 0"
    if key in _SHARES and not 0 <= value <= 1:
        return "from 0 to 1"
    return None


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
    kind = eval(annotation, {"__builtins__": {}}, {**names, "None": None})
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _read_declarations(module: str, decorator: str) -> list[MethodSpec]:
    module_spec = importlib.util.find_spec(module)
    if module_spec is None or module_spec.origin is None:
        raise ValueError(f"module {module} does not exist")
    specs: list[MethodSpec] = []
    for node in ast.parse(Path(module_spec.origin).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                specs.append(_build_spec(node, call, module))
    return specs


def _build_spec(node: ast.FunctionDef | ast.ClassDef, call: ast.Call, module: str) -> MethodSpec:
    facts: dict[str | None, Any] = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    needs_if: dict[str, set[str]] = facts.get("needs_if") or {}
    function = node
    if isinstance(node, ast.ClassDef):
        function = next(
            item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"
        )
    assert isinstance(function, ast.FunctionDef)
    hyperparameters: dict[str, Hyperparameter] = {}
    inputs: list[str] = []
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        assert argument.annotation is not None, f"{module}: {argument.arg} has no annotation"
        if default is None or ast.unparse(argument.annotation) == "Tensor | None":
            inputs.append(argument.arg)
        else:
            hyperparameters[argument.arg] = Hyperparameter(
                ast.unparse(argument.annotation), ast.literal_eval(default)
            )
    return MethodSpec(
        name=ast.literal_eval(call.args[0]),
        module=module,
        attribute=node.name,
        arxiv=facts.get("arxiv"),
        needs=frozenset(facts.get("needs", ())),
        needs_if={key: frozenset(names) for key, names in needs_if.items()},
        traits=frozenset(facts.get("traits", ())),
        hyperparameters=hyperparameters,
        inputs=tuple(inputs),
        refuses=facts.get("refuses") or {},
        doc=ast.get_docstring(node) or "",
    )
