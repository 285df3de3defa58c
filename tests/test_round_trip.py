"""Texts and their token ids: intended changes by a tokenizer are no loss, unknown characters are."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rltrain.build.tiny_model import character_tokenizer
from rltrain.round_trip import Losses, lost_share

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+=?'ABC\u00c9\u00e9"


def tokenizer_of(
    normalizer: normalizers.Normalizer | None, letters: str = LETTERS, *, sentencepiece: bool = False
) -> PreTrainedTokenizerFast:
    """One token per character; others are ``<unk>``."""
    words = {token: number for number, token in enumerate(("<unk>", "<user>", " ", "\u2581", *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<user>"]
    )


def lost(tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    return lost_share(text, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (tokenizer_of(None), "what is 1 + 1 ?"),
        (tokenizer_of(None), "<user>what"),
        (tokenizer_of(normalizers.Lowercase()), "What IS 1+1?"),
        (tokenizer_of(normalizers.NFC()), "Cafe\u0301 e\u0301"),  # an accent of its own
        (
            tokenizer_of(normalizers.NFKC()),
            "\uff11\uff0b\uff11\u00b2 \ufb01ne",
        ),  # full width, superscript, ligature
        (
            tokenizer_of(
                normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
            ),
            "Caf\u00e9",
        ),
        (tokenizer_of(normalizers.Replace(" ", "")), "a b  c"),
        (tokenizer_of(None, sentencepiece=True), "a b"),
        (tokenizer_of(None, sentencepiece=True), "<user> a b "),
        (tokenizer_of(normalizers.Replace("\u200b", "")), "a\u200bb"),  # a space of no width
        (character_tokenizer(), "<user>37 + 58\n= ~{}<assistant>"),
    ],
)
def test_what_a_tokenizer_changes_on_purpose_is_no_loss(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert lost(tokenizer, text) == 0


@pytest.mark.parametrize(
    ("tokenizer", "text", "share"),
    [
        (tokenizer_of(None), "a\u4e2db", 1 / 3),  # unknown, one token
        (tokenizer_of(None, letters=""), "<user>12", 1.0),  # nothing but special tokens is known
        (tokenizer_of(None), "it\u2019s 1+1=2", 1 / 9),
        (
            character_tokenizer(),
            "<user>\u4e2d\u6587<assistant>",
            1.0,
        ),  # unknown, no token
    ],
)
def test_the_share_of_characters_that_are_lost(
    tokenizer: PreTrainedTokenizerFast, text: str, share: float
) -> None:
    assert lost(tokenizer, text) == pytest.approx(share)


def losses_of(tokenizer: PreTrainedTokenizerFast, *texts: str) -> Losses:
    losses = Losses()
    for text in texts:
        losses.add(text, tokenizer(text)["input_ids"], tokenizer)
    return losses


def test_some_unknown_characters_are_counted() -> None:
    plain = ["a question with letters that it knows"] * 20
    foreign = "\u4e2d\u6587"
    losses = losses_of(tokenizer_of(None), "it\u2019s a quote", *plain, foreign)
    losses.check("data.jsonl", tokenizer_of(None))
    assert losses.lossy == 2


def test_many_unknown_characters_are_refused_with_the_text_that_loses_most() -> None:
    tokenizer = tokenizer_of(None)
    losses = losses_of(tokenizer, "it\u2019s", "a \u4e2d\u6587", "\u4e2d\u6587\u4e2d\u6587", "plain")
    with pytest.raises(
        ValueError,
        match=r"data.jsonl: 4\d% of the texts is lost .* example 100% of '\u4e2d.* has 49 tokens; is its tok",
    ):
        losses.check("data.jsonl", tokenizer)


def test_nothing_read_loses_nothing() -> None:
    Losses().check("data.jsonl", tokenizer_of(None))


def test_a_missing_token_in_the_middle_counts_although_the_text_ends_alike() -> None:
    tokenizer = tokenizer_of(None)
    text = "1+1=?"
    ids = tokenizer(text)["input_ids"]
    assert lost_share(text, ids[:2] + ids[3:], tokenizer) == pytest.approx(1 / 5)
