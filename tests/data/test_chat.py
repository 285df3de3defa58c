import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rltrain.data.chat import render, stop_token_ids, stop_tokens_of

WORDS = {"<s>": 0, "</s>": 1, "<end>": 2, "hello": 3, "there": 4}


def words(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A word tokenizer that puts <s> before a text and </s> after it, as some tokenizers do."""
    backend = Tokenizer(WordLevel(WORDS, unk_token="hello"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def test_stop_tokens_are_the_union_of_the_tokenizer_and_the_generation_config():
    tokenizer = words(bos_token="<s>", eos_token="</s>")
    assert stop_token_ids(tokenizer) == (1,)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=2)) == (1, 2)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[2, 1])) == (1, 2)


def test_a_missing_pad_is_filled_by_eos_and_said():
    assert stop_tokens_of(words(eos_token="</s>")) == stop_tokens_of(words(eos_token="</s>"), None)
    assert (
        stop_tokens_of(words(eos_token="</s>")).pad,
        stop_tokens_of(words(eos_token="</s>")).pad_is_eos,
    ) == (1, True)
    padded = stop_tokens_of(words(eos_token="</s>", pad_token="<end>"))
    assert (padded.pad, padded.pad_is_eos) == (2, False)


def test_no_eos_anywhere_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"has no EOS token .* set eos_token in tokenizer_config.json"):
        stop_tokens_of(words())
    assert stop_tokens_of(words(), GenerationConfig(eos_token_id=2)).stop == (2,)


def test_plain_text_begins_with_bos_once_and_never_ends_with_eos():
    tokenizer = words(bos_token="<s>", eos_token="</s>")
    assert tokenizer("hello there")["input_ids"] == [0, 3, 4, 1]
    for text in ("hello there", "<s> hello there"):
        assert render(text, tokenizer, system=None, chat_template="auto")[1] == [0, 3, 4]


def test_a_template_that_spells_bos_gets_no_second_one():
    tokenizer = words("{{ bos_token }} {{ messages[0]['content'] }}", bos_token="<s>", eos_token="</s>")
    assert render("hello there", tokenizer, system=None, chat_template="auto") == (
        "<s> hello there",
        [0, 3, 4],
    )
    assert render("hello there", tokenizer, system=None, chat_template="none") == ("hello there", [0, 3, 4])


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError, match="has no chat template; use text prompts"):
        render(
            [{"role": "user", "content": "hello"}], words(eos_token="</s>"), system=None, chat_template="auto"
        )
