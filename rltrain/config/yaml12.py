"""Reads YAML for recipes: scalars follow YAML 1.2, repeated keys are errors, and each key's line is kept.

Unmodified PyYAML reads ``1e-6`` as a string, ``off`` as false and ``1:30`` as 90, and the last of two equal
keys wins. What comes out holds only text, numbers, true, false, null, lists and mappings, all small enough
for every later step: no dates, sets or bytes, no integer beyond 64 bits, no text that UTF-8 cannot hold, no
deep nesting and no aliases that expand to a large document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rltrain.errors import RecipeError
from rltrain.registry import suggestion

KeyPath = tuple[str | int, ...]

_DEPTH = 32  # levels of nesting; the files in recipes/ have up to five
_VALUES = 20_000  # in one document, every use of an alias counted; the largest file in recipes/ has 92
_LARGEST = 2**63 - 1  # integers of PyTorch and numpy have 64 bits
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what no path and no UTF-8 file can hold
_STRING = "tag:yaml.org,2002:str"

_SCALARS = (  # tag, pattern, first characters: the core schema of YAML 1.2
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


@dataclass(frozen=True)
class Document:
    """A parsed layer of a recipe, with the line of each key."""

    source: str  # file name, or "--set a.b=1"
    data: dict[str, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)  # 1-based; 0: no line

    def location_of(self, key: KeyPath) -> str:
        """'file:line' of a key in the document."""
        return f"{self.source}:{self.lines[key]}" if self.lines.get(key) else self.source


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own class attribute)
    yaml_constructors: dict[str | None, Any] = {}  # noqa: RUF012 (as above): the types of YAML 1.2 and no others

    def construct_yaml_null(self, node: yaml.ScalarNode) -> None:
        self._matching_text(node)

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        return self._matching_text(node).lower() == "true"

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self._matching_text(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)  # a leading zero is decimal in YAML 1.2
        # Python refuses to read thousands of digits
        number = int(text, base) if len(text) <= 64 else _LARGEST + 1
        if abs(number) > _LARGEST:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"the integer {text:.40} does not fit into 64 bits; write a smaller one, or a float such as "
                "1e30",
                node.start_mark,
            )
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._matching_text(node)
        return super().construct_yaml_float(node)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if character := _NO_TEXT.search(text):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"text holds the character {character[0]!a}, which no file can hold; remove it",
                node.start_mark,
            )
        return text

    def refuse_tag(self, node: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"could not determine a constructor for the tag {node.tag!r}; leave it out: a recipe holds text, "
            "numbers, true, false, null, lists and mappings",
            node.start_mark,
        )

    def _matching_text(self, node: yaml.ScalarNode) -> str:
        """The text of a scalar, which an explicit tag such as ``!!int`` may contradict."""
        text = str(self.construct_scalar(node))
        if not _PATTERNS[node.tag].fullmatch(text):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"!!{kind} {text!r:.40} is no {kind}; correct it, or leave the tag out",
                node.start_mark,
            )
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PATTERNS = {tag: re.compile(pattern) for tag, pattern, _ in _SCALARS}
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
for _kind in ("null", "bool", "int", "float", "str", "seq", "map"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))
_Loader.add_constructor(None, _Loader.refuse_tag)  # type: ignore[arg-type]  (None: any other tag)


def parse(text: str, source: str) -> Document:
    """A mapping with the line of every key. Raises RecipeError with file and line for anything else."""
    data, lines = parse_value(text, source)
    if data is None:
        raise RecipeError(
            f"{source}: the file is empty; a recipe is a mapping of sections such as model, data and rollout"
        )
    if not isinstance(data, dict):
        raise RecipeError(
            f"{source}: expected a mapping of sections at the top level, got a {_kind_name(data)}"
        )
    return Document(source, data, lines)


def parse_value(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Any YAML value (None for an empty text) and the line of every key in it."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _collect_lines(node, (), lines, source)
        return loader.construct_document(node), lines
    except RecipeError:
        raise
    # ValueError and OverflowError: an escape such as \UFFFFFFFF, which is no character
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise RecipeError(_describe_yaml_error(error, source)) from error


def read(path: Path) -> Document:
    """``parse`` applied to a file. Raises RecipeError if it cannot be read."""
    try:
        if path.is_dir():
            raise RecipeError(f"{path}: expected a YAML file, got a directory; name one of the files in it")
        if not path.exists():
            raise RecipeError(f"{path}: no such file{_suggest_file(path)}")
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file in UTF-8 (byte {error.start}); expected YAML") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error


def dump(data: Mapping[str, Any]) -> str:
    """YAML text that ``parse`` reads back as equal data."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, width=140)


def _collect_lines(node: yaml.Node, key: KeyPath, lines: dict[KeyPath, int], source: str) -> None:
    """Fills ``lines``. Raises RecipeError for repeated keys, keys that are not strings, and too many or too
    deeply nested values.
    """
    if len(key) > _DEPTH or len(lines) > _VALUES:
        what = f"{_DEPTH} levels deep" if len(key) > _DEPTH else f"more than {_VALUES} values"
        raise RecipeError(
            f"{source}:{node.start_mark.line + 1}: {'.'.join(map(str, key[:3]))} ...: nested or repeated by "
            f"aliases to {what}, which no recipe needs; write the values out"
        )
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            _collect_lines(item, (*key, index), lines, source)
    elif isinstance(node, yaml.MappingNode):
        for name, item in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode) or name.tag != _STRING:
                shown = name.value if isinstance(name, yaml.ScalarNode) else "a list or mapping"
                raise RecipeError(f"{source}:{line}: keys must be text, got {shown!r}; put it in quotes")
            full_key = (*key, name.value)
            if full_key in lines:
                dotted = ".".join(map(str, full_key))
                raise RecipeError(
                    f"{source}:{line}: {dotted} is given twice, first on line {lines[full_key]}; keep one of "
                    "them"
                )
            lines[full_key] = line
            _collect_lines(item, full_key, lines, source)


def _kind_name(value: Any) -> str:
    return {list: "list", dict: "mapping"}.get(type(value), f"single value ({value!r})")


def _describe_yaml_error(error: Exception, source: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = " ".join(part for part in (error.context, error.problem) if part)
        return f"{source}:{error.problem_mark.line + 1}: not valid YAML: {what}"
    if isinstance(error, RecursionError):
        return f"{source}: not valid YAML: nested too deeply; write fewer levels"
    return f"{source}: not valid YAML: {str(error).splitlines()[0]}"


def _suggest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    return suggestion(path.name, [item.name for item in path.parent.glob("*.yaml")])
