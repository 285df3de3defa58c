"""Reads a user's method, ``path/to/file.py:name`` in a recipe: imports the file and checks the declaration.

The function takes what the registered methods of its kind take; its declaration is the one that ``@method``
keeps on it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from types import ModuleType
from typing import Any

from pydantic.errors import PydanticSchemaGenerationError

from rltrain.declaration import DECLARATION, Declaration, Hyperparameter, MethodSpec, is_tensor_or_none
from rltrain.needs import FRACTION, SAME_AS_POLICY_LOSS, find_word_problems
from rltrain.reward.source import import_file, source_digest

__all__ = ["UserMethod", "read_user_method", "signature_problems"]


_ABOUT_A_KEY = frozenset({FRACTION, SAME_AS_POLICY_LOSS})  # traits whose argument is a hyperparameter


@dataclass(frozen=True)
class UserMethod:
    spec: MethodSpec
    module_values: Mapping[str, Any]  # what the user's file defines, by name


def read_user_method(
    name: str, kind: str, known: Mapping[str, MethodSpec], interface: tuple[str, ...]
) -> UserMethod:
    """The method that ``name`` names.

    known: the registered methods of this kind. interface: attributes of the objects that they make.

    Raises ValueError that names the file: it does not import, declares no such method, or the method
    cannot be called and used like the registered ones.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser().resolve()
    module_values = vars(_load_module(file, source_digest(name)))
    function = module_values.get(attribute)
    if not callable(function):
        raise ValueError(f"{file} has no function or class {attribute!r}")
    declaration = getattr(function, "__dict__", {}).get(DECLARATION)  # that of a base class does not count
    if not isinstance(declaration, Declaration):
        raise ValueError(
            f'{name} declares no method; write @method("{attribute}", needs={{...}}) above it, with '
            "from rltrain import method"
        )
    if declaration.name in known:
        raise ValueError(
            f"{name} declares the name {declaration.name!r}, which is that of a registered {kind}; "
            "choose another"
        )
    spec = _spec_of(name, file, function, declaration)
    missing = [key for key in interface if inspect.isclass(function) and not hasattr(function, key)]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; a {kind} has {', '.join(interface)}")
    if problems := signature_problems(kind, known, spec):
        raise ValueError(f"{name}: {'; '.join(problems)}")
    if declaration.check and not callable(module_values.get(declaration.check)):
        raise ValueError(f"{name}: check must be a function of the same file, got {declaration.check}")
    return UserMethod(spec, module_values)


@functools.cache
def _load_module(file: Path, digest: str) -> ModuleType:
    """The module of ``file``, imported once for each state of its code."""
    suffix = hashlib.sha256(f"{file} {digest}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return import_file(file, f"user_method_{file.stem}_{suffix}")


def _spec_of(name: str, file: Path, function: Callable[..., Any], declaration: Declaration) -> MethodSpec:
    signature = inspect.signature(function)
    keywords = {
        key: parameter
        for key, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    texts = {key: _annotation_text(name, parameter) for key, parameter in keywords.items()}
    inputs = [
        key
        for key, parameter in keywords.items()
        if parameter.default is parameter.empty or is_tensor_or_none(texts[key])
    ]
    return MethodSpec(
        **vars(declaration),
        module=str(file),
        attribute=name.rpartition(":")[2],
        hyperparameters={
            key: Hyperparameter(texts[key], parameter.default, _type_of(name, function, parameter))
            for key, parameter in keywords.items()
            if key not in inputs
        },
        positional=tuple(
            key
            for key, parameter in signature.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ),
        inputs=tuple(inputs),
        doc=inspect.getdoc(function) or "",
    )


def _annotation_text(name: str, parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty:
        raise ValueError(
            f"{name}: {parameter.name} has no type; write it in the signature, as in {parameter.name}: float "
            "= 0.2"
        )
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _type_of(name: str, function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The parameter's type; a text is evaluated in the function's own file, as Python does."""
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        return annotation
    code = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    try:
        return eval(annotation, dict(getattr(code, "__globals__", {})))
    except (NameError, SyntaxError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: the type {annotation} of {parameter.name} is unknown: {error}") from error


def signature_problems(kind: str, known: Mapping[str, MethodSpec], spec: MethodSpec) -> list[str]:
    """Why the method's signature fits neither its declaration nor the calls of its stage.

    known: the registered methods of this kind.
    """
    return [
        *_unknown_types(spec),
        *find_word_problems(all_needs(spec), spec.traits),
        *_unknown_hyperparameters(spec),
        *_call_problems(kind, known, spec),
    ]


def _unknown_types(spec: MethodSpec) -> Iterator[str]:
    for key, parameter in spec.hyperparameters.items():
        try:
            parameter.adapter()
        except (NameError, PydanticSchemaGenerationError) as error:
            yield f"the type {parameter.annotation} of {key} cannot be checked: {str(error).splitlines()[0]}"


def _unknown_hyperparameters(spec: MethodSpec) -> Iterator[str]:
    """Parts of the declaration that name a hyperparameter which the signature does not have."""
    conditions = [condition.partition("=")[0] for condition in spec.needs_if]
    placeholders = [key for need in all_needs(spec) for _, key, _, _ in Formatter().parse(need) if key]
    arguments = [
        trait.partition(":")[2] for trait in sorted(spec.traits) if trait.partition(":")[0] in _ABOUT_A_KEY
    ]
    for key in dict.fromkeys([*conditions, *placeholders, *arguments, *spec.refuses]):
        if key not in spec.hyperparameters:
            yield f"@method names the hyperparameter {key}, which the signature does not have; add it there"


def _call_problems(kind: str, known: Mapping[str, MethodSpec], spec: MethodSpec) -> Iterator[str]:
    """Why the stage cannot call the method as it calls the registered ones."""
    forms = dict.fromkeys(method.positional for method in known.values())
    if len(spec.positional) not in {len(form) for form in forms}:
        shown = " or ".join(f"({', '.join(form)})" for form in forms)
        yield f"it takes ({', '.join(spec.positional)}) by position, but a {kind} takes {shown}"
    supplied = {key for method in known.values() for key in method.inputs}
    for key in spec.inputs:
        if key not in supplied:
            yield (
                f"{key} has no default, so that the stage would have to supply it, which supplies "
                f"{', '.join(sorted(supplied)) or 'no further input'}; give it a default, which makes it a "
                "hyperparameter"
            )
        elif key not in all_needs(spec) and any(key in all_needs(method) for method in known.values()):
            yield f"it takes {key}, which is computed only on request; add {key!r} to needs"


def all_needs(spec: MethodSpec) -> frozenset[str]:
    """What the method may need, under any hyperparameters."""
    return spec.needs.union(*spec.needs_if.values())
