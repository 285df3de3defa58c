"""Scalars as in YAML 1.2, and files that are not recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.config.yaml12 import dump, parse, read
from rltrain.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # PyYAML: the string "1e-6"
        ("1E6", 1e6),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("010", 10),  # PyYAML: 8
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),  # PyYAML: 1000
        ("off", "off"),  # PyYAML: False
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),  # PyYAML: 90
        ("2024-01-01", "2024-01-01"),  # PyYAML: a date
        ("'1e-6'", "1e-6"),
        (".inf", math.inf),
    ],
)
def test_a_plain_scalar_is_what_yaml_1_2_says(text: str, value: Any) -> None:
    result = parse(f"key: {text}", "recipe.yaml").data["key"]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml: the file is empty; a recipe is a mapping"),
        ("# only words\n", "r.yaml: the file is empty"),
        ("- 1", "r.yaml: expected a mapping of sections at the top level, got a list"),
        ("grpo", "r.yaml: expected a mapping of sections at the top level, got a single value ('grpo')"),
        (
            "a: 1\nb:\n  c: 2\n  d: 3\n  c: 4",
            "r.yaml:5: b.c is given twice, first on line 3; keep one of them",
        ),
        ("a:\n- {x: 1, x: 2}", "r.yaml:2: a.0.x is given twice"),
        ("a: 1\nb: [1, 2", "r.yaml:2: not valid YAML"),
        ("a:\n\t- 3", "r.yaml:2: not valid YAML"),
        ("a: 1\n8: 2", "r.yaml:2: keys must be text, got '8'; put it in quotes"),
        ("a: !!python/name:os.system x", "r.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: \x01", "r.yaml: not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_with_file_and_line(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(text, "r.yaml")
    assert str(error.value).startswith(expected)


def test_a_missing_file_suggests_its_neighbour_and_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text("a: 1")
    with pytest.raises(RecipeError, match=r"gpro\.yaml: no such file; did you mean 'grpo\.yaml'\?"):
        read(tmp_path / "gpro.yaml")
    with pytest.raises(RecipeError, match="expected a YAML file, got a directory"):
        read(tmp_path)
    with pytest.raises(RecipeError, match="nowhere does not exist either"):
        read(tmp_path / "nowhere" / "grpo.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(RecipeError, match=r"not a text file in UTF-8 \(byte 3\)"):
        read(tmp_path / "latin.yaml")


TRICKY = st.sampled_from(
    [
        "off",
        "1e6",
        "1e-6",
        "0o7",
        "0x1F",
        "010",
        "1:30",
        "2024-01-01",
        "null",
        "~",
        "",
        "=",
        "<<",
        "yes",
        ".nan",
        "- a",
        "a: b",
    ]
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False), TRICKY, TEXT
)
KEYS = st.one_of(TRICKY, TEXT)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, database=None)
@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=4))
def test_dumped_data_is_read_back_equal_with_types(data: dict[str, Any]) -> None:
    assert repr(parse(dump(data), "dumped").data) == repr(data)


@settings(max_examples=100, deadline=None, database=None)
@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=4))
def test_strings_survive_a_yaml_1_1_reader_too(data: dict[str, Any]) -> None:
    # Other tools read the resolved recipe: our strings must be strings for unmodified PyYAML as well.
    assert yaml.safe_load(dump(data)) == data
