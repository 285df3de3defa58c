"""Registries map names to functions and check hyperparameters before any model is loaded.

A method is a function (or a controller class) with a ``@method("name", ...)`` decorator. A registry lists its
modules and reads their declarations from source, so that recipes are validated without importing torch;
``bind`` imports only the module of that method. Keyword-only parameters with a default are hyperparameters,
and a default is stated in the signature only. Keyword-only parameters without a default, and those of type
``Tensor | None``, are inputs that the caller supplies; they are named in ``needs`` or ``needs_if``.

Installed packages add methods (``reward/installed.py``), which are read in the same way. A name may also be a
user's own, ``path/to/file.py:name``: ``user_methods.py`` imports that file and reads the
declaration from the function.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rltrain import needs
from rltrain.declaration import Hyperparameter, MethodSpec, declare, is_tensor_or_none, method
from rltrain.hyperparameter_ranges import expected_range
from rltrain.reward.installed import KINDS, installed_modules, installed_modules_of
from rltrain.reward.source import is_user_spec
from rltrain.user_methods import UserMethod, read_user_method, signature_problems

__all__ = ["BoundMethod", "Hyperparameter", "MethodSpec", "Registry", "method", "suggestion"]


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


@dataclass(frozen=True)
class InstalledMethods:
    """Methods of one kind that installed packages bring."""

    specs: tuple[MethodSpec, ...]
    problems: tuple[str, ...]  # what cannot be used, and why
    repeated: Mapping[str, str]  # name -> why it is ambiguous


class Registry:
    """The methods of one kind.

    ``modules`` lists where they are declared, in reading order; importing a module registers nothing.
    ``interface``: the attributes that objects have which methods of this kind make.
    """

    def __init__(
        self,
        kind: str,
        modules: tuple[str, ...],
        decorator: str = "method",
        interface: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self.modules = modules
        self.decorator = decorator
        self.interface = interface

    @functools.cached_property
    def specs(self) -> dict[str, MethodSpec]:
        """Every usable method by its name: those of this package, then those of installed ones."""
        specs = dict(self._own_specs)
        for spec in self._installed_methods.specs:
            specs[spec.name] = spec
        return specs

    @functools.cached_property
    def _own_specs(self) -> dict[str, MethodSpec]:
        specs: dict[str, MethodSpec] = {}
        for module in self.modules:
            for spec in _read_declarations(module, self.decorator):
                if spec.name in specs:
                    raise ValueError(
                        f"{self.kind} {spec.name!r} is declared in {specs[spec.name].module} and {module}"
                    )
                specs[spec.name] = spec
        return specs

    @functools.cached_property
    def _installed_methods(self) -> InstalledMethods:
        """The methods of installed packages. A fault of a package stops only recipes that name
        its methods.
        """
        specs: dict[str, MethodSpec] = {}
        problems: list[str] = []
        repeated: dict[str, str] = {}
        for entry in installed_modules_of(self.kind.replace(" ", "_")):
            try:
                declared = _read_declarations(entry.module, self.decorator)
            except (ValueError, ImportError, SyntaxError) as error:
                problems.append(f"{entry.package}: {entry.module} cannot be read: {error}")
                continue
            for spec in declared:
                if other := self._own_specs.get(spec.name) or specs.get(spec.name):
                    owner = other.package or "rltrain"
                    repeated[spec.name] = (
                        f"{owner} and {entry.package} both declare the {self.kind} {spec.name!r}; uninstall "
                        "one of them, or rename one"
                    )
                elif faults := signature_problems(self.kind, self._own_specs, spec):
                    problems.append(f"{entry.package}: {entry.module}:{spec.attribute}: {'; '.join(faults)}")
                else:
                    specs[spec.name] = dataclasses.replace(spec, package=entry.package)
        problems += [
            f"{entry.package}: {entry.kind!r} is no kind of method{suggestion(entry.kind, KINDS)}"
            for entry in installed_modules()
            if entry.kind not in KINDS
        ]
        return InstalledMethods(tuple(specs.values()), tuple(problems), repeated)

    def names(self) -> list[str]:
        return list(self.specs)

    def spec(self, name: str) -> MethodSpec:
        """The method called ``name``, a registered name or a user's ``path/to/file.py:name``.

        Raises ValueError if there is none, or if the user's file does not import or declares it wrongly.
        """
        if is_user_spec(name):
            return self._read_user_method(name).spec
        if name in self._installed_methods.repeated:
            raise ValueError(self._installed_methods.repeated[name])
        if name not in self.specs:
            looks_like_a_file = ".py" in name or ":" in name or "/" in name
            faults = "".join(
                f"; installed, but not usable: {line}" for line in self._installed_methods.problems
            )
            form = "; your own is named as path/to/file.py:name" if looks_like_a_file else ""
            raise ValueError(f"no {self.kind} is called {name!r}{suggestion(name, self.specs)}{form}{faults}")
        return self.specs[name]

    def names_with(self, trait: str) -> list[str]:
        """The sorted names of the methods that declare ``trait``."""
        return sorted(name for name, spec in self.specs.items() if trait in spec.traits)

    def find(self, name: str) -> MethodSpec | None:
        """The method called ``name``; None if there is none, which the check of the recipe reports."""
        try:
            return self.spec(name)
        except ValueError:
            return None

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
                spec.hyperparameters[key].adapter().validate_python(value)
            except ValidationError as error:
                reason = spec.refuses.get(key, {}).get(str(value), error.errors()[0]["msg"])
                raise ValueError(
                    f"{self.kind} {name!r}: {key} must be {annotation}, got {value!r} "
                    f"({type(value).__name__}): {reason}"
                ) from error
            expected = expected_range(key, value) if name in self._own_specs else None
            if expected is not None:
                raise ValueError(f"{self.kind} {name!r}: {key} is {value:g}; it must be {expected}")
        return spec

    def bind(self, name: str, hp: Mapping[str, Any] | None = None) -> BoundMethod:
        """The method with ``hp`` applied. Raises ValueError for an unknown name or key, or a wrong type."""
        hp = dict(hp or {})
        spec = self.check(name, hp)
        function = self._load_value(name, spec, spec.attribute)
        return BoundMethod(spec, hp, functools.partial(function, **hp))

    def find_problems(self, name: str, hp: Mapping[str, Any], recipe: Any) -> Iterator[str]:
        """What the rule beside the method says of it in ``recipe``. The module of a method that has one is
        imported.
        """
        spec = self.spec(name)
        if spec.check:
            yield from self._load_value(name, spec, spec.check)(spec.values_with(hp), recipe)

    def _read_user_method(self, name: str) -> UserMethod:
        return read_user_method(name, self.kind, self.specs, self.interface)

    def _load_value(self, name: str, spec: MethodSpec, attribute: str) -> Callable[..., Any]:
        """What the method's file defines as ``attribute``: the method, or the rule beside it."""
        if is_user_spec(name):
            return self._read_user_method(name).module_values[attribute]
        return getattr(importlib.import_module(spec.module), attribute)


def suggestion(word: str, choices: Any) -> str:
    """'; did you mean ...' for the closest of ``choices``, or the list of them if none is close."""
    names = sorted(map(str, choices))
    matches = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; choose from {', '.join(names)}" if names else ""


def _read_declarations(module: str, decorator: str) -> list[MethodSpec]:
    module_spec = importlib.util.find_spec(module)
    if module_spec is None or module_spec.origin is None:
        raise ValueError(f"module {module} does not exist")
    specs: list[MethodSpec] = []
    statements = ast.parse(Path(module_spec.origin).read_text(encoding="utf-8")).body
    functions = {node.name for node in statements if isinstance(node, ast.FunctionDef)} | {
        alias.asname or alias.name
        for node in statements
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in statements:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and _decorator_name(call) == decorator:
                spec = _spec_from_source(node, call, module)
                if spec.check and spec.check not in functions:
                    raise ValueError(
                        f"{node.name}: its file has no function {spec.check}, which is its check; define it "
                        "there, or import it"
                    )
                specs.append(spec)
    return specs


def _decorator_name(call: ast.Call) -> str:
    """``method`` for ``@method(...)`` and ``@rltrain.method(...)``; empty for other expressions."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


class _WithoutConstants(ast.NodeTransformer):
    """Replaces constants of ``rltrain/needs.py`` by their texts, so that what is left are literals."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = vars(needs).get(node.id)
        return ast.Constant(str(value)) if isinstance(value, needs.Word) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        word = self.visit(node.value)
        is_start = node.attr == "update_start" and isinstance(word, ast.Constant)
        return ast.Constant(f"{word.value}{needs.NOW}") if is_start else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        word = self.visit(node.func)
        match node.args:
            case [ast.Constant(value=str(argument))] if isinstance(word, ast.Constant):
                return ast.Constant(f"{word.value}:{argument}")
        return node


def _value_from_source(keyword: ast.keyword) -> Any:
    if keyword.arg == "check" and isinstance(keyword.value, ast.Name):
        return keyword.value.id
    return ast.literal_eval(_WithoutConstants().visit(keyword.value))


def _spec_from_source(node: ast.FunctionDef | ast.ClassDef, call: ast.Call, module: str) -> MethodSpec:
    facts: dict[str | None, Any] = {keyword.arg: _value_from_source(keyword) for keyword in call.keywords}
    declaration = declare(ast.literal_eval(call.args[0]), facts)
    initializers = [
        item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    ]
    function = next(iter(initializers), None) if isinstance(node, ast.ClassDef) else node
    if function is None:
        raise ValueError(
            f"{node.name} has no __init__ of its own, which states its hyperparameters; write one"
        )
    positional = tuple(argument.arg for argument in (*function.args.posonlyargs, *function.args.args))
    hyperparameters: dict[str, Hyperparameter] = {}
    inputs: list[str] = []
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if argument.annotation is None:
            raise ValueError(f"{node.name}: {argument.arg} has no type; write it in the signature")
        if default is None or is_tensor_or_none(ast.unparse(argument.annotation)):
            inputs.append(argument.arg)
        else:
            hyperparameters[argument.arg] = Hyperparameter(
                ast.unparse(argument.annotation), ast.literal_eval(default)
            )
    return MethodSpec(
        **vars(declaration),
        module=module,
        attribute=node.name,
        positional=positional[1:] if isinstance(node, ast.ClassDef) else positional,
        hyperparameters=hyperparameters,
        inputs=tuple(inputs),
        doc=ast.get_docstring(node) or "",
    )
