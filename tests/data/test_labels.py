"""Single completions with labels, from labelled rows or from preference pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.config.schema import JudgedData
from rltrain.data.judged import Reader
from rltrain.data.labels import LabelSet, are_pairs, load_labels


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(
    tokenizer: Any, source: str, needs: tuple[str, ...] = ("label",), limit: int | None = None, **keys: Any
) -> LabelSet:
    data = JudgedData(train=source, **keys)
    reader = Reader(tokenizer, (tokenizer.eos_token_id,), data)
    return load_labels(data, "train", reader, seed=0, limit=limit, needs=frozenset(needs))


def row(label: Any, completion: Any = "a", prompt: Any = "q") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_labels_are_numbers_and_classes_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    labels = load(tokenizer, jsonl(tmp_path / "l.jsonl", row(True), row(0), row(0.75), row(False)))
    assert [completion.label for completion in labels.completions] == [1.0, 0.0, 0.75, 0.0]
    assert labels.classes == (2, 2)
    assert tokenizer.decode(list(labels.completions[0].completion)) == "a<eos>"


def test_messages_are_read_by_the_template(tmp_path: Path, tokenizer: Any) -> None:
    prompt = [{"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": "yes"}]
    labels = load(
        tokenizer, jsonl(tmp_path / "l.jsonl", row(True, answer, prompt), row(False, answer, prompt))
    )
    completion = labels.completions[0]
    assert tokenizer.decode([*completion.prompt, *completion.completion]) == "<user>q<assistant>yes<eos>"


def test_pairs_are_read_as_two_completions_each(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(
        tmp_path / "p.jsonl", *({"prompt": str(n), "chosen": "yes", "rejected": "no"} for n in range(3))
    )
    labels = load(tokenizer, source)
    assert [completion.id for completion in labels.completions[:2]] == [
        "p.jsonl:0:chosen",
        "p.jsonl:0:rejected",
    ]
    assert [completion.label for completion in labels.completions] == [1, 0] * 3 and are_pairs(labels)
    assert len(load(tokenizer, source, limit=4)) == 4
    assert not are_pairs(load(tokenizer, jsonl(tmp_path / "l.jsonl", row(True), row(False))))


def test_a_loss_without_labels_learns_from_chosen_completions_alone(tmp_path: Path, tokenizer: Any) -> None:
    # DCO raises the likelihood of every completion, so it must not get the rejected side of a pair
    source = jsonl(
        tmp_path / "p.jsonl",
        *({"prompt": "q", "chosen": "a", "rejected": "b", "pass_rate": 0.5} for _ in range(3)),
    )
    labels = load(tokenizer, source, needs=("column:pass_rate",))
    assert [completion.id.rpartition(":")[2] for completion in labels.completions] == ["chosen"] * 3
    assert not are_pairs(labels)
    assert len(load(tokenizer, source)) == 6


def test_one_class_is_an_error_where_labels_are_needed(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "l.jsonl", row(True), row(True, "b"))
    with pytest.raises(
        ValueError, match="2 desirable and 0 undesirable completions: the loss learns from the contrast"
    ):
        load(tokenizer, source)
    assert len(load(tokenizer, source, needs=())) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("true")], r"line 1: label is 'true' \(str\); true, false or a number from 0 to 1"),
        ([row(2)], "label is 2"),
        ([row(None)], "line 1: the loss needs a label"),
        ([{"completion": "a", "label": True}], "line 1: no prompt beside the completion"),
        ([row(True), row(False, [{"role": "assistant", "content": "b"}])], "mixed formats"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row(
    tmp_path: Path, tokenizer: Any, rows: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tokenizer, jsonl(tmp_path / "l.jsonl", *rows))


def test_what_is_empty_or_too_long_is_left_out_or_cut_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "l.jsonl", row(True, "abcdef"), row(False, "  "), row(False, "b"))
    labels = load(tokenizer, source, max_completion_tokens=3)
    assert [tokenizer.decode(list(completion.completion)) for completion in labels.completions] == [
        "abc",
        "b<eos>",
    ]
    assert (labels.dropped, labels.changed["completions cut"]) == ({"empty": 1}, 1)
    source = jsonl(tmp_path / "d.jsonl", row(True, "abcdef"), row(True, "a"), row(False, "b"))
    assert load(tokenizer, source, max_completion_tokens=3, too_long="drop").dropped == {"too long": 1}


def test_columns_that_a_loss_asks_for_come_along(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "l.jsonl", row(True) | {"pass_rate": 0.5}, row(False) | {"pass_rate": 1})
    labels = load(tokenizer, source, needs=("column:pass_rate",))
    assert [completion.columns for completion in labels.completions] == [
        {"pass_rate": 0.5},
        {"pass_rate": 1.0},
    ]


def test_a_pair_whose_strength_prefers_the_rejected_side_gives_no_labels_and_a_contradiction_is_refused(
    tmp_path: Path, tokenizer: Any
) -> None:
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    labels = load(tokenizer, jsonl(tmp_path / "p.jsonl", pair | {"p_chosen": 0.9}, pair | {"p_chosen": 0.2}))
    assert [completion.id for completion in labels.completions] == ["p.jsonl:0:chosen", "p.jsonl:0:rejected"]
    assert labels.dropped == {"contradicted by their scores": 1}
    with pytest.raises(
        ValueError, match=r"c\.jsonl, line 2: margin 1\.0 prefer chosen, p_chosen 0\.2 prefer rejected"
    ):
        load(tokenizer, jsonl(tmp_path / "c.jsonl", pair, pair | {"p_chosen": 0.2, "margin": 1}))
