"""The script behind recipes/studies/preference: what it reads, what it keeps out, what it makes."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.scripts import script


@pytest.fixture(scope="module")
def text_models(tiny_models: ModuleType) -> Any:
    """scripts/make_text_model.py as a module; beside it lies the one that it takes parts from."""
    with pytest.MonkeyPatch.context() as patch:
        module = script("make_text_model")
        patch.setattr(module, "LAYERS", 1)
        patch.setattr(module, "WIDTH", 64)
        patch.setattr(module, "BLOCK", 16)
        patch.setattr(module, "BLOCKS", 2)
        yield module


def transcripts(*turns: str) -> str:
    return "".join(
        f"\n\n{'Human' if index % 2 == 0 else 'Assistant'}: {turn}" for index, turn in enumerate(turns)
    )


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text(
        "".join(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in pairs)
    )
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    words = ["how do I boil rice", "what is a llama", "tell me of the sea"]
    openings = [(word, f"{word} like so", "and then") for word in words]
    pairs = [(transcripts(*opening, "stop"), transcripts(*opening, "go on")) for opening in openings]
    reserved = (transcripts("is it raining", "yes"), transcripts("is it raining", "no"))
    return write(tmp_path / "train.jsonl", [*pairs, reserved]), write(tmp_path / "held_out.jsonl", [reserved])


def test_both_sides_are_read_once_and_what_is_held_out_is_not(
    text_models: Any, files: tuple[Path, Path]
) -> None:
    read, reserved = (text_models.dialogues(path) for path in files)
    assert len(read) == 8 and len(reserved) == 2
    kept = text_models.without_beginnings(read, reserved)
    assert len(kept) == 6 and not any(("user", "is it raining") in dialogue for dialogue in kept)
    first, second, *_ = text_models.without_repeated_turns(kept)
    assert [content for _, content in first] == [
        "how do I boil rice",
        "how do I boil rice like so",
        "and then",
        "stop",
    ]
    assert second == (("user", "and then"), ("assistant", "go on"))  # the rest stands in the first
    with pytest.raises(ValueError, match="every dialogue begins as a held-out one"):
        text_models.without_beginnings(reserved, reserved)


def test_the_tokenizer_learns_the_text_and_keeps_every_byte(
    text_models: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    read = text_models.dialogues(files[0])
    made = text_models.train_tokenizer([content for dialogue in read for _, content in dialogue], 320)
    made.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = "na\u00efve \u2603 rice\n\n  x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("how do I boil rice")["input_ids"]) < 8  # words, not characters
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>a<assistant>b<eos>"
    assert text_models.encode((("user", "a"), ("assistant", "b")), tokenizer)[-1] == tokenizer.eos_token_id
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_perplexity_is_of_all_tokens_but_the_first(text_models: Any, tiny_models: Any) -> None:
    tokenizer = tiny_models.character_tokenizer()
    model = tiny_models.tiny_model(tokenizer, tied=True, seed=0, layers=1, width=64, std=0.3)
    dialogues = [(("user", "ab"), ("assistant", "c")), (("user", "x"), ("assistant", "a longer answer"))]
    total = 0.0
    tokens = 0
    size = 0
    for dialogue in dialogues:
        ids = torch.tensor([text_models.encode(dialogue, tokenizer)])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= logps.gather(1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
        size += sum(len(content) for _, content in dialogue)
    fit = text_models.held_out_fit(model, dialogues, tokenizer)
    assert (fit.perplexity, fit.tokens) == (pytest.approx(math.exp(total / tokens), rel=1e-5), tokens)
    assert fit.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_equal_arguments_give_equal_weights_and_training_helps(
    text_models: Any, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = functools.partial(text_models.make_text_model, data=files[0], held_out=files[1], vocabulary=300)
    first, again, other = (
        make(tmp_path / name, steps=steps) for name, steps in (("a", 60), ("b", 60), ("c", 1))
    )
    weights = [load_file(folder / "model.safetensors") for folder in (first, again, other)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    make(first, steps=60)
    assert "already made" in capsys.readouterr().out
    ids = torch.tensor(
        [text_models.encode(text_models.dialogues(files[0])[0], AutoTokenizer.from_pretrained(first))]
    )
    trained, untrained = (
        AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=ids).loss.item()
        for folder in (first, other)
    )
    assert trained < 0.7 * untrained


def test_files_of_another_kind_are_refused(
    text_models: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    with pytest.raises(ValueError, match="pairs of Human/Assistant transcripts are expected"):
        text_models.make_text_model(tmp_path / "model", data=other, held_out=files[1])
    with pytest.raises(ValueError, match="no such file"):
        text_models.make_text_model(tmp_path / "model", data=tmp_path / "absent", held_out=files[1])
