"""Every input of a run other than its recipe has a digest under a name that describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rltrain.checkpoint.inputs import changes, code_digests, column_digests, model_digests

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "answer": "2", "tests": ["a"]},
    {"prompt": "2+2=", "answer": "4", "tests": ["b"]},
]


def changed_columns(rows: list[dict[str, Any]]) -> list[str]:
    lines = changes(column_digests("data.train", ROWS), column_digests("data.train", rows))
    return [line.split()[1] for line in lines]


def test_a_changed_column_is_named_and_no_other() -> None:
    assert changed_columns([{**ROWS[0], "answer": "3"}, ROWS[1]]) == ["answer"]
    assert changed_columns([ROWS[0], {**ROWS[1], "tests": ["b", "c"]}]) == ["tests"]
    assert changed_columns([{**row, "level": 1} for row in ROWS]) == ["level"]
    assert changed_columns([{name: row[name] for name in ("prompt", "answer")} for row in ROWS]) == ["tests"]
    assert changed_columns([dict(reversed(row.items())) for row in ROWS]) == []


def test_rows_in_another_order_or_number_are_other_data() -> None:
    assert changed_columns(ROWS[::-1]) == ["prompt", "answer", "tests"]
    assert changed_columns(ROWS[:1]) == ["prompt", "answer", "tests"]
    # values that move between rows: the answers read in order are the same
    sparse = [{"answer": "2"}, {}], [{}, {"answer": "2"}]
    assert changes(*(column_digests("data.train", rows) for rows in sparse))


@pytest.mark.parametrize("value", [2, 2.0, "2", ["2"], {"a": 2}, None, float("nan"), b"2"])
def test_values_of_other_types_are_other_values(value: object) -> None:
    digests = [column_digests("d", [{"answer": other}]) for other in (value, [value], "another")]
    assert not changes(digests[0], column_digests("d", [{"answer": value}]))
    assert changes(digests[0], digests[1]) and changes(digests[0], digests[2])


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (
            {"reward": {"functions": [{"name": "exact"}, {"name": "FILE:f"}]}},
            "code of reward.functions.1 (FILE:f)",
        ),
        ({"rollout": {"environment": {"name": "FILE:World"}}}, "code of rollout.environment (FILE:World)"),
        # a section where no recipe has user code yet
        ({"advantage": {"name": "FILE:mine"}}, "code of advantage (FILE:mine)"),
    ],
)
def test_a_users_file_of_any_kind_is_code(tmp_path: Path, recipe: dict[str, Any], named: str) -> None:
    file = tmp_path / "own.py"
    helper = tmp_path / "helper.py"
    file.write_text("import helper\n")
    helper.write_text("x = 1\n")
    plain = eval(repr(recipe).replace("FILE", str(file)))
    before = code_digests(plain)
    assert list(before) == [named.replace("FILE", str(file))]
    helper.write_text("x = 2\n")  # what it imports counts
    assert changes(before, code_digests(plain))


def test_files_of_models_are_noticed_wherever_they_change(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(64 << 16) + bytes(1000))  # sampled, not read whole
    (folder / "tokenizer.json").write_text("{}")
    recipe = {"model": {"path": str(folder), "reference": None}, "data": {"train": str(folder)}}
    before = model_digests(recipe)
    assert list(before) == [f"files of model.path ({folder})"]
    (folder / "README.md").write_text("a card may be written anew")
    assert model_digests(recipe) == before
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')  # other tokens would end an answer
    assert changes(before, model_digests(recipe))
    (folder / "generation_config.json").unlink()
    weights.write_bytes(bytes(64 << 16) + bytes(999) + b"1")
    assert changes(before, model_digests(recipe))


def test_every_model_that_a_recipe_names_counts(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "c"))
    recipe = {
        "model": {"path": a, "teacher": b},
        "process_reward": {"path": None, "reference": "policy"},
        "reward": {"functions": [{"name": "reward_model", "path": c}]},
    }
    assert list(model_digests(recipe)) == [
        f"files of model.path ({a})",
        f"files of model.teacher ({b})",
        f"files of reward.functions.0.path ({c})",
    ]
