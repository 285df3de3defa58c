"""Every field of a step's rollouts comes back from the journal as it was, and anyone can read the file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rltrain.checkpoint.journal import Journal, StepHeader, StepRecord, WaitingGroups, origin_of
from rltrain.checkpoint.journal_table import SCHEMA, groups_of_table, require_columns, table_of_groups
from rltrain.checkpoint.plain_values import decode_value, encode_value
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.errors import UserError
from rltrain.reward.score import Episode, Score
from rltrain.rollout.collate import collate
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span, TokenSets
from support.sample_strategies import COLUMN_VALUES, scored_groups

HEADER = StepHeader(3, 2, "w", "o", {"order": {"next": 4}}, 5, 2, [1, 0], {"rollout": 0.25}, {"control": 1.5})
GROUP = ScoredGroup(
    7,
    Prompt("d/3", (5, 6), "2+2=", {"answer": 4}),
    (
        Completion((4, 1), (-0.5, -1e-9), "stop", "4", (Span(0, 2, 9),)),
        Completion((8,), (-3.25,), "length", "8", (Span(0, 1, 9),), source=1, turns=((0, 1),)),
    ),
    (Score(1.0, {"correct": 1.0}, answer="4"), Score(math.nan, ungraded="timeout", why="slow")),
)


def exact(groups: tuple[ScoredGroup, ...]) -> str:
    """Every field of everything in ``groups``, those that ``==`` leaves out among them."""
    return repr([dataclasses.asdict(group) for group in groups])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(groups=scored_groups())
def test_every_field_comes_back(groups: tuple[ScoredGroup, ...], tmp_path_factory: Any) -> None:
    journal = Journal(RunFolder(tmp_path_factory.mktemp("run")))
    journal.write(StepRecord(HEADER, groups))
    record = journal.read(3)
    assert exact(record.groups) == exact(groups)
    assert record.header == HEADER == journal.read_header(3)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(groups=scored_groups())
def test_the_tensors_of_a_step_come_back_to_the_bit(groups: tuple[ScoredGroup, ...]) -> None:
    rows, batch = collate(groups)
    rows_again, again = collate(groups_of_table(table_of_groups(groups)))
    assert repr(rows) == repr(rows_again)
    for item in dataclasses.fields(TrainBatch):
        value = getattr(batch, item.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(123.0), getattr(again, item.name).nan_to_num(123.0)), (
                item.name
            )


def test_every_field_of_the_nouns_has_a_column() -> None:
    """A field that somebody adds must be kept as well: this test and the strategies name all of them."""
    names = {noun: {item.name for item in dataclasses.fields(noun)} for noun in (Completion, Prompt, Score)}
    assert names[Prompt] == {"id", "token_ids", "text", "columns", "messages"}
    assert {f"prompt_{name}" for name in names[Prompt]} <= {*SCHEMA.names}
    assert names[Completion] <= {*SCHEMA.names}
    assert names[Score] - {"value", "parts"} <= {*SCHEMA.names}
    assert {item.name for item in dataclasses.fields(TokenSets)} == {
        item.name for item in SCHEMA.field("kept").type
    }
    episode = {item.name for item in dataclasses.fields(Episode)}
    assert episode == {item.name for item in SCHEMA.field("episode").type}
    assert {item.name for item in dataclasses.fields(ScoredGroup)} == {
        "group",
        "prompt",
        "completions",
        "scores",
    }


@given(value=COLUMN_VALUES)
def test_values_of_columns_come_back_with_their_types(value: Any) -> None:
    text = encode_value(value)
    assert text.isascii()
    assert repr(decode_value(text)) == repr(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_numbers_that_json_does_not_have_come_back(value: float) -> None:
    assert decode_value(encode_value([value])) == [value]
    assert math.isnan(decode_value(encode_value(math.nan)))


def test_anyone_reads_the_file(tmp_path: Path) -> None:
    journal = Journal(RunFolder(tmp_path))
    journal.write(StepRecord(HEADER, (GROUP,)))
    rows = pq.read_table(tmp_path / "rollouts/step-000003.parquet").to_pylist()
    assert [row["text"] for row in rows] == ["4", "8"]
    assert json.loads(rows[0]["prompt_columns"]) == {"answer": 4}
    assert rows[0]["versions"] == [{"start": 0, "stop": 2, "version": 9}]
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000003.parquet"]


def test_half_a_surrogate_pair_is_written_as_its_escape() -> None:
    score = Score(0.0, why="\ud800 file")
    group = dataclasses.replace(GROUP, scores=(score, score))
    assert groups_of_table(table_of_groups([group]))[0].scores[0].why == "\\ud800 file"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "renamed"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    journal = Journal(RunFolder(tmp_path))
    many = tuple(dataclasses.replace(GROUP, group=number) for number in range(50))
    journal.write(StepRecord(HEADER, many))
    path = journal.path(3)
    content = bytearray(path.read_bytes())
    if damage == "renamed":
        path = path.rename(journal.path(4))
    elif damage == "other":
        path.write_bytes(b"something else")
    else:
        middle = len(content) // 3
        content[middle] ^= 0xFF
        path.write_bytes({"cut": content[:middle], "flip": content, "empty": b""}[damage])
    with pytest.raises(UserError, match=path.name):
        journal.read(4 if damage == "renamed" else 3)


def test_a_column_that_cannot_be_kept_is_named_before_the_run() -> None:
    with pytest.raises(UserError, match=r"prompt 'd/1': a column .* object .* journal\.keep"):
        require_columns([Prompt("d/1", (1,), "", {"image": object()})])


def test_a_group_without_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="group 7 has no completion"):
        table_of_groups([ScoredGroup(7, GROUP.prompt, (), ())])


@given(change=st.sampled_from(["step", "version", "weights", "state", "settings"]))
def test_every_part_of_an_origin_counts(change: str) -> None:
    parts: dict[str, Any] = {"step": 1, "version": 0, "weights": "a", "state": {"n": 1}, "settings": "s"}
    other: dict[str, Any] = {"step": 2, "version": 1, "weights": "b", "state": {"n": 2}, "settings": "t"}
    assert origin_of(**parts) == origin_of(**parts) != origin_of(**{**parts, change: other[change]})


@pytest.mark.parametrize(("keep", "left"), [("all", [1, 2, 3, 4]), ("resume", [3, 4])])
def test_files_that_no_checkpoint_needs_are_removed(keep: str, left: list[int], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    journal = Journal(folder, keep)
    for step in range(1, 5):
        journal.write(StepRecord(dataclasses.replace(HEADER, step=step), (GROUP,)))
    journal.prune()
    assert journal.steps() == [1, 2, 3, 4]  # no checkpoint yet: a resumed run begins with step 1
    for step in (2, 4):
        folder.checkpoint(step).mkdir(parents=True)
    journal.prune()
    assert journal.steps() == left


def test_a_group_waits_on_the_disk_for_the_weights_that_drew_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    waiting = WaitingGroups(folder, "settings")
    waiting.write(7, GROUP, {9: "nine"})
    assert waiting.numbers() == [7] and Journal(folder).steps() == []
    read = waiting.read(7, "d/3", {8: "eight", 9: "nine"})
    assert read is not None and exact((read,)) == exact((GROUP,))
    for weights in ({}, {8: "nine"}, {9: "eight"}):
        assert waiting.read(7, "d/3", weights) is None
    assert waiting.read(7, "d/4", {9: "nine"}) is None
    assert waiting.read(8, "d/3", {9: "nine"}) is None
    assert WaitingGroups(folder, "others").read(7, "d/3", {9: "nine"}) is None
    content = waiting.path(7).read_bytes()
    waiting.path(8).write_bytes(content)  # it was copied
    assert waiting.read(8, "d/3", {9: "nine"}) is None
    for damaged in (content[:-9], b"", b"no parquet"):
        waiting.path(7).write_bytes(damaged)
        assert waiting.read(7, "d/3", {9: "nine"}) is None
    waiting.remove([6, 7, 8])
    assert waiting.numbers() == []
