"""Whatever a data file holds ends in examples or in one message that names the file, and for a bad row its
line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.config.schema import Data, JudgedData
from rltrain.data.chat import stop_tokens_of
from rltrain.data.judged import Reader
from rltrain.data.labels import load_labels
from rltrain.data.preferences import load_pairs
from rltrain.data.prompts import load_prompts
from support.fuzzing import fuzz_settings

SETTINGS = fuzz_settings(1000)
KINDS = ("prompts", "pairs", "labels")
STRICT = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    "{{ '<' + m['role'] + '>' + m['content'] + (m['tool_calls'][0]['name'] if m.tool_calls else '') }}"
    "{%- endfor -%}"
)
DEEP = "[" * 500 + "]" * 500
# JSON values: text of every kind, numbers beyond a float, messages that are nearly right
TEXTS = st.one_of(
    st.sampled_from(['"1+1="', '"2"', '"3"', '""', '" "', r'"\ud83d"', r'"a\udc00b"', '"\\u4e00"', '"{x}"']),
    st.text(max_size=5).map(json.dumps),
)
ATOMS = st.one_of(
    TEXTS,
    st.sampled_from(
        [
            "null",
            "true",
            "0",
            "-1",
            "0.5",
            "NaN",
            "-Infinity",
            "1e999",
            "9" * 400,
            "9" * 5000,
            "[]",
            "{}",
            DEEP,
        ]
    ),
)
PARTS = st.one_of(
    ATOMS,
    TEXTS.map(lambda text: f'[{{"type": "text", "text": {text}}}]'),
    ATOMS.map(lambda value: f'[{{"type": "text", "text": {value}}}, {value}]'),
)
ROLES = st.one_of(st.sampled_from(['"user"', '"assistant"', '"system"', '"tool"', '"x"']), ATOMS)
MESSAGES = st.one_of(
    st.builds(
        lambda role, content, calls: f'{{"role": {role}, "content": {content}, "tool_calls": {calls}}}',
        ROLES,
        PARTS,
        ATOMS,
    ),
    st.builds(lambda content: f'{{"role": "assistant", "content": {content}}}', PARTS),
    ATOMS,
)
VALUES = st.one_of(ATOMS, st.lists(MESSAGES, max_size=3).map(lambda items: f"[{', '.join(items)}]"))
NAMES = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "margin",
    "p_chosen",
    "score_chosen",
    "answer",
    "messages",
    "tools",
    "chat_template_kwargs",
)
QUESTION = '{"role": "user", "content": "1+1="}'
REPLY = '{"role": "assistant", "content": "2"}'
SOUND_ROWS = (
    {"prompt": '"1+1="', "answer": '"2"'},
    {"prompt": f"[{QUESTION}]", "answer": '"2"'},
    {"prompt": '"1+1="', "chosen": '"2"', "rejected": '"3"', "margin": "1"},
    {"prompt": f"[{QUESTION}]", "chosen": f"[{REPLY}]", "rejected": f"[{QUESTION}]", "score_chosen": "2"},
    {"chosen": f"[{QUESTION}, {REPLY}]", "rejected": f"[{QUESTION}, {QUESTION}]", "margin": "1"},
    {"prompt": '"1+1="', "completion": '"2"', "label": "true"},
    {"prompt": f"[{QUESTION}]", "completion": f"[{REPLY}, {QUESTION}, {REPLY}]", "label": "1"},
    {"messages": f"[{QUESTION}, {REPLY}, {QUESTION}, {REPLY}]"},
)
CHANGES = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=2)
# most of any row is refused for its columns; a sound row with one changed gets further
ROWS = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6),
    st.builds(lambda row, changes: {**row, **changes}, st.sampled_from(SOUND_ROWS), CHANGES),
    st.builds(lambda row, changes: {**row, **changes}, st.sampled_from(SOUND_ROWS), CHANGES),
)
LINES = st.one_of(
    ROWS.map(lambda row: "{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}"),
    ATOMS,
    st.text(max_size=20),
)


def load(kind: str, path: Path, tokenizer: Any, **settings: Any) -> Any:
    if kind == "prompts":
        return load_prompts(Data(train=str(path), **settings), "train", tokenizer, seed=0)
    data = JudgedData(train=str(path), **settings)
    reader = Reader(tokenizer, stop_tokens_of(tokenizer).stop, data)
    if kind == "pairs":
        return load_pairs(data, "train", reader, seed=0, needs=frozenset({"margin"}))
    return load_labels(data, "train", reader, seed=0, needs=frozenset())


def written(folder: Path, *lines: str) -> Path:
    path = folder / "d.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return path


@SETTINGS
@given(kind=st.sampled_from(KINDS), lines=st.lists(LINES, min_size=1, max_size=3), strict=st.booleans())
def test_any_file_is_read_or_refused_by_name(
    kind: str, lines: list[str], strict: bool, tmp_path: Path, tokenizer: Any
) -> None:
    path = written(tmp_path, *lines)
    if strict:
        tokenizer.chat_template = STRICT
    try:
        load(kind, path, tokenizer)
    except ValueError as error:
        assert "d.jsonl" in str(error) and len(str(error).splitlines()) == 1


def test_one_column_of_a_pair_beside_completions_is_no_pair(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        f'{{"prompt": "1", "completion": "2", "label": {label}, "chosen": ""}}' for label in ("true", "false")
    ]
    path = written(tmp_path, *rows)
    labels: Any = load("labels", path, tokenizer)
    assert labels.classes == (1, 1)
    with pytest.raises(ValueError, match="columns chosen and rejected are needed"):
        load("pairs", path, tokenizer)


MESSAGE = '{"role": "user", "content": "1+1="}'
BAD_ROWS = [
    ("prompts", r'{"prompt": "\ud800"}', r"half of a surrogate pair ('\ud800')"),
    ("prompts", '{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested more than 64 levels"),
    ("prompts", '{"prompt": ' + DEEP + "}", "nested more than 64 levels"),
    ("prompts", '{"prompt": ' + "9" * 5000 + "}", "more than 4300 digits"),
    ("prompts", '{"prompt": [{"role": "user", "content": null}]}', "content of type NoneType"),
    ("pairs", r'{"prompt": "1", "chosen": "\ud800", "rejected": "2", "margin": 1}', "surrogate"),
    (
        "pairs",
        '{"prompt": "1", "chosen": "1", "rejected": "2", "margin": 1' + "0" * 400 + "}",
        "into a float",
    ),
    ("labels", '{"prompt": "1", "completion": [[]], "label": true}', "message 0 is []"),
    (
        "labels",
        '{"prompt": "1", "completion": [{"role": "x", "content": "2"}], "label": true}',
        "unknown role",
    ),
]


@pytest.mark.parametrize(("kind", "line", "message"), BAD_ROWS)
def test_a_bad_row_is_named_with_its_line(
    kind: str, line: str, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    good = '{"prompt": "1", "completion": "2", "label": true}'
    lines = (good, line) if kind == "labels" and "[" not in line else (line,)
    with pytest.raises(ValueError, match="line 1: ") as error:
        load(kind, written(tmp_path, *lines), tokenizer)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_that_raises_names_the_row(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("2", "3"))
    prompt = [{"role": "system", "content": "s"}, json.loads(MESSAGE)]
    line = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 1})
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: .*refuses these messages.*no system role"):
        load(kind, written(tmp_path, line), tokenizer)


def test_a_prompt_without_tokens_names_the_row(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, *['{"prompt": "1+1="}'] * 9, '{"prompt": "\\u4e00"}')
    with pytest.raises(ValueError, match=r"d\.jsonl, line 10: the prompt .* has no tokens"):
        load("prompts", path, tokenizer, chat_template="none")


def test_content_in_parts_is_read_as_its_text(tmp_path: Path, tokenizer: Any) -> None:
    parts = '[{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]'
    line = f'{{"prompt": [{{"role": "user", "content": {parts}}}]}}'
    plain = load("prompts", written(tmp_path, f'{{"prompt": [{MESSAGE}]}}'), tokenizer).prompts[0]
    assert load("prompts", written(tmp_path, line), tokenizer).prompts[0].token_ids == plain.token_ids


def test_a_dotted_name_leads_into_a_column(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, '{"prompt": "1+1=", "reward_model": {"style": "rule", "ground_truth": "2"}}')
    answer = {"answer": "reward_model.ground_truth"}
    assert load("prompts", path, tokenizer, columns=answer).prompts[0].columns["answer"] == "2"
    with pytest.raises(ValueError, match=r"line 1: no column 'reward_model\.truth' for 'answer'"):
        load("prompts", path, tokenizer, columns={"answer": "reward_model.truth"})
