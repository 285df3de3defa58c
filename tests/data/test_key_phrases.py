"""Key phrases by RAKE, and texts degraded by taking them out."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from rltrain.data.chat import StopTokens
from rltrain.data.key_phrases import degraded_completions, degraded_texts, key_phrases, remove_phrases
from rltrain.data.preferences import Pair
from rltrain.data.tokenization import Tokenization

TEXT = "The Gulf Stream is a warm ocean current. It is warm, and the current of the ocean carries heat."


def test_a_phrase_scores_the_sum_of_its_words_degree_over_frequency() -> None:
    # candidates: gulf stream | warm ocean current | warm | current | ocean carries heat
    # gulf, stream 2/1; warm (3 + 1)/2, ocean (3 + 3)/2, current (3 + 1)/2; carries, heat 3/1
    # scores: 4 | 2 + 3 + 2 = 7 | 2 | 2 | 3 + 3 + 3 = 9
    expected = ["ocean carries heat", "warm ocean current", "gulf stream", "warm", "current"]
    assert key_phrases(TEXT) == expected


def test_a_phrase_goes_everywhere_and_words_inside_others_stay() -> None:
    assert remove_phrases("Warm, warm ocean, and warm.", ["warm"]) == ", warm ocean, and ."
    assert remove_phrases("a cat and a cat", ["cat"]) == "a and a "
    assert remove_phrases("don't go", ["go"]) == "don't go"  # one candidate: "don't go"
    assert remove_phrases(TEXT, []) == TEXT


def test_degrees_lack_more_and_more_of_the_key_phrases() -> None:
    texts = degraded_texts(TEXT, levels=4, share=0.75)
    # 5 phrases: round(1.25) = 1, round(2.5) = 2, round(3.75) = 4
    assert list(texts) == [0, 1, 2, 3]
    assert texts[0] == TEXT
    assert texts[1] == "The Gulf Stream is a warm ocean current. It is warm, and the current of the ."
    assert texts[2] == "The Gulf Stream is a . It is warm, and the current of the ."
    assert texts[3] == "The is a . It is , and the current of the ."
    assert list(degraded_texts("42", levels=4, share=0.75)) == [0, 3]
    assert degraded_texts("of the, and...", levels=4, share=0.75) == {0: "of the, and..."}


@pytest.fixture(scope="module")
def tokenization(random_model: str) -> Tokenization:
    tokenizer: Any = AutoTokenizer.from_pretrained(random_model)
    end = int(tokenizer.eos_token_id)
    return Tokenization(tokenizer, StopTokens((end,), end, pad_is_eos=False), len(tokenizer))


def test_the_end_of_a_completion_stays(tokenization: Tokenization) -> None:
    end = tokenization.stop_tokens.stop[0]
    digits = tuple(tokenization.tokenizer("12+30", add_special_tokens=False)["input_ids"])
    pair = Pair("0", digits, (*digits, end), (end,))
    versions = dict(degraded_completions(pair, tokenization, levels=3, share=1.0))
    # two phrases of one word each: the first goes first
    plus_30 = tuple(tokenization.tokenizer("+30", add_special_tokens=False)["input_ids"])
    plus = tuple(tokenization.tokenizer("+", add_special_tokens=False)["input_ids"])
    assert versions == {0: (*digits, end), 1: (*plus_30, end), 2: (*plus, end)}
