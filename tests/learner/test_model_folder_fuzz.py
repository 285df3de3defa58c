"""Whatever the files of a model folder hold ends in a model or in one line, never in a foreign exception."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.config.capacity.shape import read_shape
from rltrain.config.schema import Model
from rltrain.data.chat import render
from rltrain.data.tokenization import tokenization_of
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.loading import require_weights
from support.fuzzing import fuzz_settings

JSON_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")
NUMBERS = [True, -1, 0, 3, 10**9, 10**30, 0.5, float("nan")]
VALUES = st.sampled_from([None, *NUMBERS, "x", "2", "", "\ud800", [], [[]], {}, {"a": 1}, [1, "x"]])


def opened(folder: Path) -> None:
    """What ``rltrain train`` does with a folder before any weight is loaded."""
    with user_mistakes():
        tokenization = tokenization_of(Model(path=str(folder)), {"data.max_prompt_tokens": 8})
        require_weights(str(folder), None, "logits")
        token_ids = render("1+1=", tokenization.tokenizer, system=None, chat_template="auto")[1]
        tokenization.require_embedded([("prompt", token_ids)])


def edit(folder: Path, name: str, **fields: Any) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(data | fields))


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


BROKEN: dict[str, Callable[[Path], object]] = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": write("model.safetensors", b""),
    "huge header": write("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "half of the weights": lambda folder: write(
        "model.safetensors", (folder / "model.safetensors").read_bytes()[:-1000]
    )(folder),
    "config is no JSON": write("config.json", "{"),
    "config is a list": write("config.json", "[]"),
    "config is empty": write("config.json", "{}"),
    "config is deep": write("config.json", "[" * 50_000 + "]" * 50_000),
    "layers -1": lambda folder: edit(folder, "config.json", num_hidden_layers=-1),
    "layers as text": lambda folder: edit(folder, "config.json", num_hidden_layers="2"),
    "odd hidden size": lambda folder: edit(folder, "config.json", hidden_size=130),
    "small vocabulary": lambda folder: edit(folder, "config.json", vocab_size=50),
    "rotary as text": lambda folder: edit(folder, "config.json", rope_theta="x", rope_parameters="x"),
    "other tokenizer": write("tokenizer.json", '{"a": 1}'),
    "template that is none": write("chat_template.jinja", "{% for %}"),
    "template that escapes": write("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template that raises": write("chat_template.jinja", "{{ raise_exception('no') }}"),
    "generation config is no JSON": write("generation_config.json", "{"),
    "eos as text": lambda folder: edit(folder, "generation_config.json", eos_token_id="x"),
    "eos beyond the vocabulary": lambda folder: edit(folder, "generation_config.json", eos_token_id=10**9),
    "code elsewhere": lambda folder: edit(folder, "config.json", auto_map={"AutoConfig": "e/r--conf.Evil"}),
}


@pytest.fixture(scope="module")
def folder(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Makes the same folder anew, as it was before the last example."""
    path = tmp_path_factory.mktemp("model") / "copy"

    def renew() -> Path:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(random_model, path)
        return path

    return renew


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line_that_names_it(name: str, folder: Callable[[], Path]) -> None:
    path = folder()
    opened(path)
    BROKEN[name](path)
    if name == "code elsewhere":  # code that nobody trusts: transformers has this architecture itself
        return opened(path)
    with pytest.raises(UserError) as error:
        opened(path)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    return None


def places(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys of a JSON tree, the first of each long list or mapping."""
    if key:
        yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in [*items][:30]:
        yield from places(item, (*key, name))


@fuzz_settings(150)
@given(data=st.data())
def test_any_change_of_a_json_file(folder: Callable[[], Path], data: st.DataObject) -> None:
    path = folder()
    file = path / data.draw(st.sampled_from(JSON_FILES))
    content = json.loads(file.read_text())
    *inner, last = data.draw(st.sampled_from([*places(content)]))
    holder = content
    for part in inner:
        holder = holder[part]
    holder[last] = data.draw(VALUES)
    file.write_text(json.dumps(content))
    read_shape(path / "config.json")
    try:
        opened(path)
    except UserError as error:
        assert str(error)
