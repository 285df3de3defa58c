"""What a chat template receives beside messages: tools, variables, and a template file of the user's."""

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.config.schema import Data, JudgedData
from rltrain.data.judged import Reader
from rltrain.data.preferences import load_pairs
from rltrain.data.prompts import load_prompts

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TEMPLATE = (
    "{%- if tools -%}{{ '<system>T' + tools|length|string }}{%- endif -%}"
    "{%- if quiet -%}{{ '<system>Q' }}{%- endif -%}"
    "{%- for message in messages -%}{{ '<' + message.role + '>' + message.content }}"
    "{%- if message.role == 'assistant' -%}{{ '<eos>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)


@pytest.fixture
def tools_tokenizer(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(tokenizer: Any, source: str, **keys: Any) -> list[str]:
    prompts = load_prompts(Data(train=source, **keys), "train", tokenizer, seed=0)
    return [prompt.text for prompt in prompts.prompts]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON text"])
def test_tools_of_a_row_reach_the_template(tmp_path: Path, tools_tokenizer: Any, tools: Any) -> None:
    rows = [
        {"prompt": "1+2=", "tools": tools},
        {"prompt": "3=", "tools": None},
        {"prompt": "5=", "tools": []},
    ]
    shown = texts(tools_tokenizer, jsonl(tmp_path / "a.jsonl", *rows))
    assert shown == ["<system>T1<user>1+2=<assistant>", "<user>3=<assistant>", "<user>5=<assistant>"]


def test_tools_that_the_template_does_not_show_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"prompt": "1+2=", "tools": [TOOL]})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .* shows no tools, and the row has 1; set"):
        texts(tokenizer, source)
    assert texts(tokenizer, source, columns={"unused": "tools"}) == ["<user>1+2=<assistant>"]
    with pytest.raises(ValueError, match=r"there are tools, but data\.chat_template is none"):
        texts(tokenizer, source, chat_template="none")


def test_variables_of_recipe_and_row_reach_the_template(tmp_path: Path, tools_tokenizer: Any) -> None:
    rows = [
        {"prompt": "1", "chat_template_kwargs": {"quiet": False, "other": None}},
        {"prompt": "2", "chat_template_kwargs": None},
    ]
    source = jsonl(tmp_path / "a.jsonl", *rows)
    shown = texts(tools_tokenizer, source, chat_template_kwargs={"quiet": True})
    assert shown == ["<user>1<assistant>", "<system>Q<user>2<assistant>"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", "[{]", "tools is text, but not JSON"),
        ("tools", {"name": "add"}, "a list of JSON schemas"),
        ("tools", [1], "a list of JSON schemas"),
        ("chat_template_kwargs", [1], "a mapping such as"),
        ("chat_template_kwargs", {"tokenize": True}, "'tokenize' is set by the trainer"),
    ],
)
def test_a_column_of_another_kind_is_told_with_its_line(
    tmp_path: Path, tools_tokenizer: Any, column: str, value: Any, message: str
) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2", column: value})
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{message}"):
        texts(tools_tokenizer, source)


def test_a_variable_that_the_trainer_sets_is_refused_in_the_recipe() -> None:
    with pytest.raises(ValueError, match="'add_generation_prompt' is set by the trainer"):
        Data(train="a", chat_template_kwargs={"add_generation_prompt": False})


def test_pairs_show_their_tools(tmp_path: Path, tools_tokenizer: Any) -> None:
    row = {"prompt": "1+2=", "chosen": "3", "rejected": "4", "tools": [TOOL]}
    data = JudgedData(train=jsonl(tmp_path / "a.jsonl", row), chat_template_kwargs={"quiet": True})
    reader = Reader(tools_tokenizer, (tools_tokenizer.eos_token_id,), data)
    pair = load_pairs(data, "train", reader, seed=0, needs=frozenset()).pairs[0]
    assert tools_tokenizer.decode(list(pair.prompt)) == "<system>T1<system>Q<user>1+2=<assistant>"
    assert tools_tokenizer.decode(list(pair.chosen)) == "3<eos>"
