"""Conversations as rows: the assistant's turns are scored, whatever the template writes around them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rltrain.config.schema import JudgedData
from rltrain.data.conversations import ConversationRow, encode_conversation
from rltrain.data.judged import Reader
from rltrain.data.labels import LabelSet, load_labels

# marks the assistant's part for transformers' own mask
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{{ '  ' }}{% else %}{{ '<' + m.role + '>' + m.content + '  ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# leaves out thoughts of earlier turns, as the templates of reasoning models do
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{{ m.content if loop.last else "
    "m.content.split(';')[-1] }}<eos>{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDLESS = (  # ends no turn
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# a filler and a second end token at the very end, after the blank that follows every turn
TWICE_ENDED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{{ '<eos>' if m.role == 'assistant' }}"
    "{{ '  ' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% else %}<eos>{% endif %}"
)
OPENING = "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>think:{% endif %}"
)
TALK = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "no;two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "yes;four"},
)


def read(tokenizer: Any, template: str, *messages: Any, first: int = 0, **keys: Any) -> list[ConversationRow]:
    tokenizer.chat_template = template
    reader = Reader(tokenizer, (tokenizer.eos_token_id,), JudgedData(train="x", **keys))
    return encode_conversation(messages, reader, reader.inputs_of(row_of({})), first)


def row_of(columns: Mapping[str, Any]) -> Any:
    from rltrain.data.rows import Row

    return Row("x:1", "x:1", dict(columns))


def texts(tokenizer: Any, rows: list[ConversationRow]) -> list[tuple[str, str]]:
    """(everything, the scored part) of each row."""
    return [
        (
            tokenizer.decode([*row.prompt, *row.completion]),
            tokenizer.decode([token for token, flag in zip(row.completion, row.scored, strict=True) if flag]),
        )
        for row in rows
    ]


@pytest.mark.parametrize("system", [None, "be kind"])
@pytest.mark.parametrize("talk", [TALK, TALK[:2], (*TALK, {"role": "user", "content": "five"})])
def test_scored_tokens_are_those_that_the_template_itself_marks(
    tokenizer: Any, talk: tuple[Any, ...], system: str | None
) -> None:
    [row] = read(tokenizer, MARKED, *talk, system=system)
    messages = [*([{"role": "system", "content": system}] if system else []), *talk]
    marked = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ids = [*row.prompt, *row.completion]
    scored = [*[0] * len(row.prompt), *map(int, row.scored)]
    assert marked["input_ids"][: len(ids)] == ids
    assert marked["assistant_masks"][: len(ids)] == scored
    assert not any(marked["assistant_masks"][len(ids) :]) and scored[-1] == 1


def test_a_turn_that_the_template_rewrites_later_has_a_row_of_its_own(tokenizer: Any) -> None:
    assert texts(tokenizer, read(tokenizer, FORGETFUL, *TALK)) == [
        ("<user>one<assistant>no;two<eos>", "no;two<eos>"),
        ("<user>one<assistant>two<eos><user>three<assistant>yes;four<eos>", "yes;four<eos>"),
    ]


def test_turns_without_an_end_token_get_one_in_rows_of_their_own(tokenizer: Any) -> None:
    assert texts(tokenizer, read(tokenizer, ENDLESS, *TALK)) == [
        ("<user>one<assistant>no;two<eos>", "no;two<eos>"),
        ("<user>one<assistant>no;two<user>three<assistant>yes;four<eos>", "yes;four<eos>"),
    ]
    single_turn = texts(tokenizer, read(tokenizer, ENDLESS, *TALK[:2]))
    assert single_turn == [("<user>one<assistant>no;two<eos>", "no;two<eos>")]


def test_what_a_template_writes_after_the_end_token_is_read_but_not_scored(tokenizer: Any) -> None:
    assert texts(tokenizer, read(tokenizer, TWICE_ENDED, *TALK)) == [
        (
            "<user>one  <assistant>no;two<eos>  <user>three  <assistant>yes;four<eos>",
            "no;two<eos>yes;four<eos>",
        )
    ]


def test_earlier_turns_may_be_part_of_the_prompt(tokenizer: Any) -> None:
    [row] = read(tokenizer, MARKED, *TALK, first=2)
    assert tokenizer.decode(list(row.completion)) == "yes;four<eos>" and all(row.scored)


def test_refusals_say_the_remedy(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"before message 1 otherwise.*data\.chat_template"):
        read(tokenizer, OPENING, *TALK)
    with pytest.raises(ValueError, match=r"unset data\.system"):
        read(tokenizer, MARKED, {"role": "system", "content": "s"}, *TALK, system="t")
    with pytest.raises(ValueError, match=r"no chat template.*template file"):
        read(tokenizer, MARKED, *TALK, chat_template="none")


# rows of a data set -----------------------------------------------------------------------------------------


def load(tokenizer: Any, path: Path, *rows: Mapping[str, Any], **keys: Any) -> LabelSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer.chat_template = MARKED
    data = JudgedData(train=str(path), **keys)
    reader = Reader(tokenizer, (tokenizer.eos_token_id,), data)
    return load_labels(data, "train", reader, seed=0, needs=frozenset())


def test_conversations_are_read_from_a_file_and_what_is_left_out_is_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    empty = [TALK[0], {"role": "assistant", "content": ""}]
    rows = [{"messages": messages} for messages in (TALK, TALK[:1], TALK[1:2], empty)]
    read_rows = load(tokenizer, tmp_path / "c.jsonl", *rows)
    assert [item.id for item in read_rows.completions] == ["c.jsonl:0"]
    assert {reason: count for reason, count in read_rows.dropped.items() if count} == {
        "without an answer": 2,
        "empty": 1,
    }
    [item] = read_rows.completions
    assert item.scored is not None and [*map(len, [item.scored])] == [len(item.completion)]


def test_long_conversations_are_cut_or_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": TALK}, {"messages": TALK[:2]}]
    cut = load(tokenizer, tmp_path / "c.jsonl", *rows, max_completion_tokens=10)
    assert [len(item.completion) for item in cut.completions] == [10, 7]
    assert cut.changed["completions cut"] == 1
    assert [item.scored for item in cut.completions] == [(True,) * 7 + (False,) * 3, None]
    kept = load(tokenizer, tmp_path / "c.jsonl", *rows, max_completion_tokens=10, too_long="drop")
    assert len(kept) == 1 and kept.dropped["too long"] == 1


def test_turns_of_others_in_a_completion_are_not_scored(tmp_path: Path, tokenizer: Any) -> None:
    [item] = load(tokenizer, tmp_path / "c.jsonl", {"prompt": TALK[:1], "completion": TALK[1:]}).completions
    [expected] = load(tokenizer, tmp_path / "d.jsonl", {"messages": TALK}).completions
    assert (item.prompt, item.completion, item.scored) == (
        expected.prompt,
        expected.completion,
        expected.scored,
    )


def test_messages_that_are_text_are_told_with_their_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"c\.jsonl.*messages is text"):
        load(tokenizer, tmp_path / "c.jsonl", {"messages": "hello"})
