"""Numbers of single tokens in transcripts: which tokens, which numbers, whose text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rltrain.report.token_numbers import (
    COMPLETIONS,
    TOKENS,
    TokenNumbers,
    TokenTensors,
    numbers_of_row,
    rows_of_group,
    split_text,
)
from rltrain.report.transcripts import Transcripts
from rltrain.reward.score import Score
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes; 0 is a special token without text."""
    return bytes(token for token in token_ids if token).decode("utf-8", errors="replace")


def group(number: int, *texts: bytes) -> ScoredGroup:
    completions = tuple(
        Completion((*text, 0), (-0.5,) * (len(text) + 1), "stop", text.decode(), (Span(0, len(text) + 1, 0),))
        for text in texts
    )
    return ScoredGroup(
        number, Prompt(f"row-{number}", (1,), "?"), completions, tuple(Score(1.0) for _ in texts)
    )


def step_tensors(rows: Sequence[tuple[int, int]], width: int) -> TokenTensors:
    """rows: (group, sample) of each row. Entropy is 10 row + column, the learner's log-prob -0.25."""
    count = len(rows)
    place = 10.0 * torch.arange(count)[:, None] + torch.arange(width)
    mask = torch.ones(count, width, dtype=torch.bool)
    mask[:, 1] = False
    batch = TrainBatch(
        mask=mask,
        advantages=torch.full((count, width), 2.0),
        weights=torch.full((count, width), 0.5),
        rewards=torch.zeros(count),
        group=torch.tensor([number for number, _ in rows]),
        source=torch.zeros(count, dtype=torch.int64),
        version=torch.zeros(count, dtype=torch.int64),
        sample=torch.tensor([sample for _, sample in rows]),
        rollout_logp=torch.full((count, width), -0.5),
    )
    return TokenTensors(batch, torch.full((count, width), -0.25), place)


def test_numbers_are_those_of_the_completions_own_row() -> None:
    # the row of sample 0 of group 7 was dropped, as those of the reference model are
    tensors = step_tensors([(3, 0), (7, 1)], width=3)
    assert rows_of_group(tensors.batch, 7) == {1: 1}
    dropped, record = TokenNumbers(decode_bytes, every=1).records(group(7, b"no", b"ok"), tensors)
    assert dropped is None
    assert record == {
        "text": ["o", "k", ""],
        "entropy": [10.0, 11.0, 12.0],
        "advantage": [2.0, 2.0, 2.0],
        "weight": [0.5, 0.0, 0.5],  # the second token is masked out
        "engine": [0.25, 0.25, 0.25],
    }


def test_versions_and_clipping_are_there_where_they_say_something() -> None:
    tensors = step_tensors([(0, 0)], width=3)
    (record,) = TokenNumbers(decode_bytes, every=1).records(group(0, b"no"), tensors)
    assert record is not None and "version" not in record and "clip" not in record
    spans = (Span(0, 1, 4), Span(1, 3, 5))
    completion = Completion((*b"no", 0), (-0.5,) * 3, "stop", "no", spans)
    mixed = ScoredGroup(0, Prompt("row-0", (1,), "?"), (completion,), (Score(1.0),))
    clipped = torch.tensor([[0.0, 2.0, 1.0]])
    touched = torch.tensor([[1.0, 0.0, 0.0]])
    read = TokenTensors(tensors.batch, tensors.logp, tensors.entropy, clipped, touched)
    (record,) = TokenNumbers(decode_bytes, every=1).records(mixed, read)
    assert record is not None
    assert record["version"] == [4, 5, 5] and record["clip"] == [0.0, 2.0, 1.0]
    assert record["touched"] == [1.0, 0.0, 0.0]
    unmoved = TokenTensors(tensors.batch, tensors.logp, tensors.entropy, clipped, 0 * touched)
    (record,) = TokenNumbers(decode_bytes, every=1).records(mixed, unmoved)
    assert record is not None and "touched" not in record


def test_the_reference_is_there_where_the_step_read_it() -> None:
    tensors = step_tensors([(0, 0)], width=2)
    read = TokenTensors(
        tensors.batch.replace(ref_logp=torch.full((1, 2), -1.25)), tensors.logp, tensors.entropy
    )
    assert numbers_of_row(0, 2, read)["reference"].tolist() == [1.0, 1.0]


def test_long_and_many_completions_are_cut() -> None:
    texts = [b"x" * (TOKENS + 50)] * (COMPLETIONS + 2)
    tensors = step_tensors([(0, sample) for sample in range(len(texts))], width=TOKENS + 51)
    records = TokenNumbers(decode_bytes, every=1).records(group(0, *texts), tensors)
    assert [record is None for record in records] == [False] * COMPLETIONS + [True, True]
    assert records[0] is not None and {len(values) for values in records[0].values()} == {TOKENS}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab", ["a", "b"]),
        ("a\u00e9b", ["a", "", "\u00e9", "b"]),
        ("\U0001f600!", ["", "", "", "\U0001f600", "!"]),
    ],
)
def test_a_character_of_several_tokens_belongs_to_the_last(text: str, pieces: list[str]) -> None:
    assert split_text(tuple(text.encode()), decode_bytes) == pieces


def test_bytes_that_spell_nothing_lose_no_token() -> None:
    pieces = split_text((0xFF,) * 20 + (65,), decode_bytes)
    assert len(pieces) == 21 and pieces[-1].endswith("A")


def test_numbers_are_kept_on_evenly_spaced_steps_and_are_json(tmp_path: Path) -> None:
    log = Transcripts(tmp_path / "t.jsonl", 1, TokenNumbers(decode_bytes, every=5))
    tensors = step_tensors([(0, 0)], width=3)
    tensors.entropy[0, 0] = math.nan
    for step in (1, 2, 5):
        log.log(step, [group(0, b"ok")], tensors=tensors)
    log.log(5, [group(0, b"ok")], "eval")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    numbers = [line["completions"][0].get("token_numbers") for line in lines]
    assert [value is not None for value in numbers] == [True, False, True, False]
    assert numbers[0]["entropy"] == [None, 1.0, 2.0]
