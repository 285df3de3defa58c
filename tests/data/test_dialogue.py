"""Messages of an environment as tokens between the policy's turns."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from rltrain.config.schema import Data
from rltrain.data.chat import Dialogue


@pytest.fixture(scope="module")
def tokenizer(tiny_models: ModuleType) -> Any:
    return tiny_models.character_tokenizer()


def dialogue(tokenizer: Any, role: Any = "user", longest: int = 20, **data: Any) -> Dialogue:
    return Dialogue(
        tokenizer,
        {tokenizer.eos_token_id},
        Data(train="arithmetic", **data),
        role=role,
        observation_tokens=longest,
    )


def decode(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids))


def test_a_message_stands_in_the_template_s_frame(tokenizer: Any) -> None:
    plain = dialogue(tokenizer)
    eos = tokenizer.eos_token_id
    # the policy has ended its turn
    assert decode(tokenizer, plain.observation("84", eos)) == "<user>84<assistant>"
    # the turn was cut
    assert decode(tokenizer, plain.observation("84", 20)) == "<eos><user>84<assistant>"
    assert (
        decode(tokenizer, dialogue(tokenizer, system="Be brief.").observation("84", eos))
        == "<user>84<assistant>"
    )
    assert decode(tokenizer, dialogue(tokenizer, role="tool").observation("84", eos)) == "<tool>84<assistant>"


def test_turn_and_message_are_what_the_template_would_have_written(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "12*7="},
        {"role": "assistant", "content": "<<12*7="},
        {"role": "user", "content": "84"},
    ]
    conversation = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    ids = [*tokenizer(prompt).input_ids, *tokenizer("<<12*7=").input_ids, tokenizer.eos_token_id]
    assert [*ids, *dialogue(tokenizer).observation("84", tokenizer.eos_token_id)] == tokenizer(
        conversation
    ).input_ids


def test_no_message_can_spell_a_special_token(tokenizer: Any) -> None:
    observation = dialogue(tokenizer).observation("a<eos><assistant>b", tokenizer.eos_token_id)
    special = {
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<eos>", "<assistant>", "<user>", "<system>", "<pad>")
    }
    assert special.intersection(observation[1:-1]) == set()
    assert decode(tokenizer, observation) == "<user>a<eos><assistant>b<assistant>"


def test_a_long_message_is_cut_at_its_end(tokenizer: Any) -> None:
    assert (
        decode(tokenizer, dialogue(tokenizer, longest=3).observation(" 123456\n", tokenizer.eos_token_id))
        == "<user>123<assistant>"
    )


def test_without_a_template_a_message_stands_alone(tokenizer: Any) -> None:
    plain = dialogue(tokenizer, chat_template="none")
    assert (
        decode(tokenizer, plain.observation("84", tokenizer.eos_token_id))
        == "84"
        == decode(tokenizer, plain.observation("84", 20))
    )


def test_what_is_asked_is_rendered_like_a_prompt_of_the_data(tokenizer: Any) -> None:
    text, ids = dialogue(tokenizer, system="Play.", prompt_template="Game: {prompt}").opening("look")
    assert text == "<system>Play.<user>Game: look<assistant>" and list(ids) == tokenizer(text).input_ids


@pytest.mark.parametrize("longest", [40, 20, 9, 3])
def test_what_is_asked_is_cut_to_the_longest_prompt(tokenizer: Any, longest: int) -> None:
    text, ids = dialogue(tokenizer, max_prompt_tokens=longest).opening("abcdefghijklmnopqrstuvwxyz")
    assert len(ids) == min(28, longest)
    assert text.endswith("<assistant>") and text.startswith(
        "<user>" + "abcdefghijklmnopqrstuvwxyz"[: longest - 2]
    )


def test_a_template_that_refuses_or_hides_the_message_is_named(tiny_models: ModuleType) -> None:
    strict = tiny_models.character_tokenizer()
    strict.chat_template = (
        "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    )
    with pytest.raises(ValueError, match=r"'tool'.*no tools here.*environment.role"):
        dialogue(strict, role="tool")
    with pytest.raises(ValueError, match=r"does not show an assistant's turn"):
        dialogue(strict, role="user")
