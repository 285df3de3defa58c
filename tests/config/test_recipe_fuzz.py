"""Whatever a recipe, a profile or ``--set`` holds ends in a recipe or in a RecipeError, never in a foreign
exception.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.config.fragments import check_fragment
from rltrain.config.load import load_recipe
from rltrain.config.plan import plan
from rltrain.config.rules import check
from rltrain.config.yaml12 import parse, read
from rltrain.errors import RecipeError
from support.fuzzing import fuzz_settings
from support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "recipes/profiles/tiny_cpu.yaml"
RECIPES = [
    ROOT / "recipes" / name
    for name in ("policy/grpo.yaml", "policy/dapo.yaml", "policy/prime.yaml", "preference/dpo.yaml")
]
SETTINGS = fuzz_settings(120)

# values as YAML text: each kind of scalar, tags, extremes, and collections where none is expected
VALUES = st.one_of(
    st.sampled_from(
        [
            "null",
            "true",
            "-1",
            "0",
            "1e308",
            ".inf",
            ".nan",
            "9" * 19,
            "9" * 25,
            "9" * 5000,
            "0x" + "f" * 40,
            "!!int abc",
            "!!float x",
            "!!bool maybe",
            "!!timestamp 2020-01-01",
            "!!binary aGVsbG8=",
            "!!set {a, b}",
            "!!str [1]",
            "!!python/none x",
            '"\\ud83d"',
            '"\\0"',
            '"\\UFFFFFFFF"',
            "[]",
            "{}",
            "[[]]",
            "{name: [1]}",
            "{name: {a: 1}}",
            "{name: null}",
            "{name: clip, x: 1}",
            "[1, [2]]",
            "&a [*a]",
            "{a: &b {c: 1}, d: *b}",
            "text",
            "''",
            "x.py:f",
            ":",
            "~/x.py:y",
            "-0.0",
            "'{'",
            "'{prompt.x}'",
            "'{0}'",
            "2020-01-01",
            "n" * 5000,
            "http://[",
            "((",
            "a{99999999999}",
        ]
    ),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=10).map(json.dumps),
)
WORDS = st.sampled_from(["name", "0", "1", "-1", "9" * 5000, "extends", "sizes", "kind", "\u00b2", "hp", "a"])


def leaves(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a tree, of inner nodes too."""
    if key:
        yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from leaves(item, (*key, name))


class Raw:
    """YAML text in the place of a value."""

    def __init__(self, text: str) -> None:
        self.text = text


def flow(value: Any) -> str:
    """``value`` as YAML on one line."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return json.dumps(value)


@st.composite
def changed(draw: st.DrawFn, path: Path) -> str:
    """The text of the file at ``path`` with one to three values replaced."""
    data = copy.deepcopy(read(path).data)
    for _ in range(draw(st.integers(1, 3))):
        keys = list(leaves(data))
        *inner, last = draw(st.sampled_from(keys))
        holder: Any = data
        for part in inner:
            holder = holder[part]
        holder[last] = Raw(draw(VALUES))
    return "\n".join(f"{json.dumps(name)}: {flow(item)}" for name, item in data.items())


def accepts_or_refuses(path: Path, profile: Path | None, overrides: list[str]) -> None:
    """Raises what is neither a recipe nor a RecipeError."""
    try:
        recipe = check(load_recipe(path, profile=profile and str(profile), overrides=overrides)).recipe
    except RecipeError as error:
        assert error.problems and all(error.problems)
        return
    plan(recipe)


@SETTINGS
@given(data=st.data())
def test_changed_recipes(tmp_path: Path, data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(RECIPES))
    text = data.draw(changed(original))
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("../base", str(ROOT / "recipes/base")), encoding="utf-8")
    accepts_or_refuses(path, data.draw(st.sampled_from([None, PROFILE])), [])


@SETTINGS
@given(data=st.data())
def test_changed_profiles(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "profiles/profile.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(data.draw(changed(PROFILE)), encoding="utf-8")
    accepts_or_refuses(data.draw(st.sampled_from(RECIPES)), path, [])
    with contextlib.suppress(RecipeError):
        check_fragment(path)


@SETTINGS
@given(data=st.data())
def test_overrides(data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from(RECIPES))
    keys = list(leaves(json.loads(load_recipe(recipe, profile=str(PROFILE)).model_dump_json())))
    parts = [str(part) for part in data.draw(st.sampled_from(keys))]
    parts += data.draw(st.lists(WORDS, max_size=2))
    accepts_or_refuses(recipe, PROFILE, [f"{'.'.join(parts)}={data.draw(VALUES)}"])


@SETTINGS
@given(text=st.text(st.sampled_from("a1:-[]{}&*!|>'\"\\#%@`,? \n\tx~<=\ud800\x00\u2028\ufeff"), max_size=40))
def test_any_text(text: str) -> None:
    try:
        parse(text, "r.yaml")
    except RecipeError as error:
        assert str(error).startswith("r.yaml")


def test_an_alias_bomb_is_refused_in_time() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
    start = time.perf_counter()
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: .*more than 20000 values"):
        parse("\n".join(lines), "r.yaml")
    assert time.perf_counter() - start < PATIENCE  # without the limit more, and gigabytes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.optimizer.betas=[1.5, 0.9]", "less than 1"),
        ("train.deadline_seconds=1e308", "less than or equal to 100000000"),
        ("reward.memory_gib=1e308", "less than or equal to 1000000"),
        ("reward.workers=1000000", "less than or equal to 4096"),
        ("seed=1000000000000000000000000000000", "does not fit into 64 bits"),
        ("seed=-1", "greater than or equal to 0"),
        ("data.prompt_template=Answer", "no placeholder"),
        ("data.prompt_template='{prompt.x}'", "more than the name of a column"),
        ("data.prompt_template='{prompt:9999999999}'", "more than the name of a column"),
        ("data.prompt_template='{prompt'", "expected '}'"),
        ("eval.k=[]", "at least 1 item"),
        ("eval.k=[0, 8]", "greater than or equal to 1"),
        ("loss.policy={name: clip, eps_low: -5}", "eps_low is -5; it must be at least 0"),
        ("control=[{name: hapo, rho: 2}]", "rho is 2; it must be from 0 to 1"),
        ("reward.functions=[{name: math_answer, seconds: 0}]", "seconds is 0; it must be above 0"),
        ("model.path=!!int abc", "'abc' is no int"),
        ("model.path=!!timestamp 2020-01-01", "tag:yaml.org,2002:timestamp"),
        ('model.path="\\ud83d"', "which no file can hold"),
        ("kind={a: 1}", "no kind of recipe"),
        ("advantage.name=[1]", "advantage.name: got [1]"),
    ],
)
def test_values_that_cannot_be_meant(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check(load_recipe(RECIPES[0], profile=str(PROFILE), overrides=[override]))
    assert message in str(error.value)


def test_a_negative_beta_of_a_preference_loss() -> None:
    with pytest.raises(RecipeError, match=r"beta is -0\.5; it must be at least 0"):
        check(load_recipe(RECIPES[3], overrides=["loss.preference.beta=-0.5"]))
