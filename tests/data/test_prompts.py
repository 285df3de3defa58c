import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.config.schema import Data
from rltrain.data.prompts import load_prompts, without_prompts


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tokenizer, source: str, side="train", limit=None, seed=0, **keys):
    return load_prompts(
        Data(train=source, **{"eval": source, **keys}), side, tokenizer, seed=seed, limit=limit
    )


def test_text_becomes_a_user_message_and_other_columns_reach_the_rewards(tmp_path, tokenizer):
    source = jsonl(
        tmp_path / "sums.jsonl",
        {"prompt": "1+2=", "answer": "3", "level": [1]},
        {"prompt": "3+4=", "answer": "7", "level": [2]},
    )
    first, second = load(tokenizer, source).prompts
    assert first.text == "<user>1+2=<assistant>"
    assert tokenizer.convert_ids_to_tokens(list(first.token_ids)) == [
        "<user>",
        "1",
        "+",
        "2",
        "=",
        "<assistant>",
    ]
    assert first.columns == {"answer": "3", "level": [1]}
    assert (first.id, second.id) == ("sums.jsonl:0", "sums.jsonl:1")
    assert first.messages is None


def test_messages_are_rendered_by_the_chat_template(tmp_path, tokenizer):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt = load(
        tokenizer,
        jsonl(tmp_path / "chat.jsonl", {"prompt": turns}),
        system="s",
        prompt_template="{prompt} never used on messages",
    ).prompts[0]
    assert prompt.text == "<system>s<user>a<assistant>b<eos><user>c<assistant>"
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, *turns], add_generation_prompt=True, return_dict=False
    )
    assert prompt.messages == ({"role": "system", "content": "s"}, *turns)


def test_template_and_columns_rename_and_wrap(tmp_path, tokenizer):
    source = jsonl(tmp_path / "q.jsonl", {"question": "1+2", "unit": "cm", "prompt": "not this"})
    prompt = load(
        tokenizer,
        source,
        columns={"prompt": "question"},
        prompt_template="{prompt} in {unit}:",
        chat_template="none",
    ).prompts[0]
    assert prompt.text == "1+2 in cm:"
    assert prompt.columns == {"unit": "cm"}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "train.jsonl"])
def test_every_file_kind_and_a_folder_give_the_same_prompts(tmp_path, tokenizer, name):
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(5)]
    path = tmp_path / name
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        jsonl(path, *rows)
    prompts = load(tokenizer, str(tmp_path if name.startswith("train") else path)).prompts
    assert [(p.text, p.columns["answer"]) for p in prompts] == [
        (f"<user>{n}+1=<assistant>", str(n + 1)) for n in range(5)
    ]
    assert len({p.id for p in prompts}) == 5


def test_a_folder_of_sharded_splits_or_of_save_to_disk_is_read_by_split(tmp_path, tokenizer):
    from datasets import Dataset, DatasetDict

    for number in range(2):
        jsonl(tmp_path / f"test-{number}.jsonl", {"prompt": f"t{number}"})
    jsonl(tmp_path / "train.jsonl", {"prompt": "a"})
    assert [p.text for p in load(tokenizer, str(tmp_path), "eval", chat_template="none").prompts] == [
        "t0",
        "t1",
    ]
    saved = tmp_path / "saved"
    DatasetDict(
        train=Dataset.from_list([{"prompt": "x"}]), test=Dataset.from_list([{"prompt": "y"}])
    ).save_to_disk(str(saved))
    assert [p.text for p in load(tokenizer, str(saved), "eval", chat_template="none").prompts] == ["y"]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], not 'dev'"):
        load(tokenizer, str(saved), train_split="dev")


def test_over_long_prompts_are_dropped_and_counted(tmp_path, tokenizer):
    # the template adds 2 tokens to each: <user>, <assistant>
    source = jsonl(tmp_path / "l.jsonl", {"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "abcde"})
    loaded = load(tokenizer, source, max_prompt_tokens=6)
    assert [p.text for p in loaded.prompts] == ["<user>abc<assistant>", "<user>abcd<assistant>"]
    assert loaded.dropped == {"too_long": 1}
    with pytest.raises(ValueError, match=r"no prompt is left of 3 .*'too_long': 3.*max_prompt_tokens is 2"):
        load(tokenizer, source, max_prompt_tokens=2)


def test_a_limit_takes_the_first_so_many_of_a_seeded_shuffle(tmp_path, tokenizer):
    source = jsonl(tmp_path / "n.jsonl", *({"prompt": str(n)} for n in range(50)))
    assert [p.id for p in load(tokenizer, source).prompts] == [f"n.jsonl:{n}" for n in range(50)]
    drawn, again, other = (load(tokenizer, source, limit=10, seed=seed).prompts for seed in (0, 0, 1))
    assert drawn == again != other
    assert len({p.id for p in drawn}) == 10
    assert load(tokenizer, source, limit=20, seed=0).prompts[:10] == drawn


def test_prompts_that_are_also_held_out_are_removed_and_counted(tmp_path, tokenizer):
    train = load(
        tokenizer,
        jsonl(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"}, {"prompt": "2"}, {"prompt": "3"}),
    )
    held_out = load(tokenizer, jsonl(tmp_path / "b.jsonl", {"prompt": "2"}, {"prompt": "9"}))
    apart = without_prompts(train, held_out)
    assert [p.id for p in apart.prompts] == ["a.jsonl:0", "a.jsonl:3"]
    assert apart.dropped == {"too_long": 0, "shared": 2}
    with pytest.raises(ValueError, match=r"each of the 4 prompts .* none is left"):
        without_prompts(train, train)


def test_the_arithmetic_task_has_disjoint_sides(tokenizer):
    data = Data(train="arithmetic", eval="arithmetic", options={"digits": 1})
    train, held_out = (load_prompts(data, side, tokenizer, seed=0) for side in ("train", "eval"))
    assert len(train) + len(held_out) == 100
    assert len(without_prompts(train, held_out)) == len(train)
    assert train.prompts[0].text.startswith("<user>")


def test_gsm8k_annotations_become_prompts_with_counts(tmp_path, tokenizer):
    rows = [
        {"question": "?", "solution": "<<48/2=24>> <<1+1=x>>"},
        {"question": "?", "solution": "<<48/2=24.00>>"},
    ]
    source = jsonl(tmp_path / "g.jsonl", *rows)
    loaded = load(tokenizer, source, adapter="gsm8k_calculator", columns={"answer": "solution"})
    assert [(p.text, p.columns, p.id) for p in loaded.prompts] == [
        ("<user>48/2=<assistant>", {"answer": "24"}, "g.jsonl:0.0")
    ]
    assert loaded.dropped == {"repeated": 1, "malformed": 1, "too_long": 0}
    with pytest.raises(ValueError, match="no calculator annotation"):
        load(tokenizer, jsonl(tmp_path / "plain.jsonl", {"answer": "24"}), adapter="gsm8k_calculator")


GOOD = {"prompt": "1+1=", "answer": "2"}
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "1", "answer": "2"},
            r"no column 'prompt'; there are \['answer', 'question'\]; name the right one in data.columns",
        ),
        ({"prompt": 7}, r"prompt is int \(7\); text or a list of messages is expected"),
        ({"prompt": None}, r"prompt is NoneType"),
        ({"prompt": " \n"}, r"prompt is empty"),
        ({"prompt": []}, r"list of messages is empty"),
        ({"prompt": [USER, {"role": "assistant", "content": "x"}]}, r"last message is from 'assistant'"),
        ({"prompt": [{"role": "human", "content": "x"}]}, r"unknown role 'human'; roles are system, user"),
        (
            {"prompt": [{"role": "user"}]},
            r"message 0 is .*each message is a mapping with 'role' and 'content'",
        ),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, r"content of type list"),
        ({"prompt": [{"role": "user", "content": ""}]}, r"last message is empty"),
        (["prompt"], r"a row is a JSON object"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path, tokenizer, row, message):
    source = jsonl(tmp_path / "bad.jsonl", GOOD, row, GOOD)
    with pytest.raises(ValueError, match=rf"bad.jsonl, line 2: .*{message}"):
        load(tokenizer, source, limit=1)  # found although it might not have been drawn


def test_malformed_json_is_refused_with_file_line_and_column(tmp_path, tokenizer):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "1"}\n\n{"prompt": "2",}\n')
    with pytest.raises(
        ValueError, match=r"broken.jsonl, line 3: not JSON \(.* at column 1\d\): '\{\"prompt\": \"2\",\}'"
    ):
        load(tokenizer, str(path))
    (tmp_path / "broken.json").write_text('[{"prompt": "1"},\n{"prompt": 2')
    with pytest.raises(ValueError, match=r"broken.json, line 2: not JSON"):
        load(tokenizer, str(tmp_path / "broken.json"))


def test_a_line_separator_inside_a_string_is_not_a_new_line(tmp_path, tokenizer):
    path = tmp_path / "u.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert load(tokenizer, str(path), chat_template="none").prompts[0].text == "a\u2028b"


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ("", {}, "is empty; at least one row"),
        (
            '{"prompt": "1"}',
            {"prompt_template": "{prompt} {level}"},
            "asks for 'level'; .*line 1 has the columns",
        ),
        ('{"prompt": "1"}', {"prompt_template": "{prompt} {}"}, "write {prompt} for the prompt"),
        (
            '{"prompt": "1"}',
            {"columns": {"answer": "gold"}},
            r"line 1: no column 'gold' for 'answer' \(data.columns\); there are \['prompt'\]",
        ),
        (
            '{"prompt": "1"}',
            {"options": {"digits": 2}},
            r"data.options \['digits'\] belong to a built-in task",
        ),
        ('{"prompt": "1"}', {"train_split": "train[:10]"}, "one file and has no splits to slice"),
        (
            '{"prompt": "1"}',
            {"system": "s", "chat_template": "none"},
            "data.system is set, but data.chat_template is none",
        ),
        (
            '{"prompt": [{"role": "user", "content": "x"}]}',
            {"chat_template": "none"},
            "list of messages, but data.chat_template is none",
        ),
        (
            '{"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]}',
            {"system": "s"},
            "its own system message",
        ),
    ],
)
def test_data_that_does_not_fit_the_recipe_is_refused(tmp_path, tokenizer, content, keys, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tokenizer, str(path), **keys)


def test_a_missing_or_foreign_file_is_refused(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"no such file or folder \(from .*\)$"):
        load(tokenizer, "nowhere/train.jsonl")
    with pytest.raises(ValueError, match=r"no such file .*; scripts/get_data.py makes the files of data/$"):
        load(tokenizer, "data/gsm8k/absent.jsonl")
    (tmp_path / "train.txt").write_text("1")
    with pytest.raises(ValueError, match=r"ends in .jsonl, .json, .parquet, not '.txt'"):
        load(tokenizer, str(tmp_path / "train.txt"))
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"cannot read .*bad.parquet"):
        load(tokenizer, str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match=r"data.eval is not set"):
        load(tokenizer, "arithmetic", "eval", eval=None)
    with pytest.raises(ValueError, match="splits 'train' and 'test', not 'dev'"):
        load(tokenizer, "arithmetic", train_split="dev")


def test_a_name_the_hub_does_not_give_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"cannot read someone/absent, split train: .*a data set is a built-in task"
    ):
        load(tokenizer, "someone/absent")


def test_held_out_files_may_name_their_columns_differently(tmp_path, tokenizer):
    train = tmp_path / "train.jsonl"
    held_out = tmp_path / "test.jsonl"
    train.write_text('{"question": "1+1=", "answer": "2"}\n')
    held_out.write_text('{"problem": "2+2=", "answer": "4"}\n')
    data = Data(
        train=str(train),
        eval=str(held_out),
        columns={"prompt": "question"},
        eval_columns={"prompt": "problem"},
    )
    columns = [load_prompts(data, side, tokenizer, seed=0).prompts[0].columns for side in ("train", "eval")]
    assert columns == [{"answer": "2"}, {"answer": "4"}]
