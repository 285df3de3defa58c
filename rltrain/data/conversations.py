"""Whole conversations as rows: what the assistant wrote is scored, everything else is read only.

The template is asked for the text before each of the assistant's turns, with the generation prompt as in
sampling, and for the text up to its end; the turn stands between the two. Prompts, turns and the text between
turns are tokenised separately, because a policy continues the tokens of what it read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rltrain.data.chat import Message, TemplateInputs, apply_template, read_messages
from rltrain.data.judged import Reader
from rltrain.data.rows import Row

__all__ = ["ConversationRow", "conversation_of", "encode_conversation", "has_assistant_turn"]


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """Token ids of a conversation up to its last scored turn; the completion begins with the first one."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    scored: tuple[bool, ...]  # by completion token: True in the assistant's turns and their end tokens


class _Turn(NamedTuple):
    before: str  # everything that the template writes before the turn, generation prompt included
    text: str  # up to its end token; blank text and further end tokens after it are not the policy's
    tokens: tuple[int, ...]  # of the turn, with the token that ends it
    has_end: bool  # whether the template itself writes the end token


def conversation_of(row: Row, name: str = "messages") -> list[Message]:
    """The column's messages with their content as text. Raises ValueError where they are none."""
    try:
        return read_messages(row.columns[name])
    except ValueError as error:
        raise ValueError(f"{row.where}: {name}: {error}") from error


def has_assistant_turn(messages: Sequence[Message], first: int) -> bool:
    """Whether a message from position ``first`` on is the assistant's, and answers something."""
    return any(_is_answer(messages, position) for position in range(first, len(messages)))


def encode_conversation(
    messages: Sequence[Message], reader: Reader, inputs: TemplateInputs, first: int = 0
) -> list[ConversationRow]:
    """One row in which every turn of the assistant from position ``first`` on is scored.

    One row for each such turn where the template writes a turn otherwise once the conversation goes on (as
    those that leave out earlier thoughts), or does not end a turn with an end token. Empty where a turn has
    no text. Raises ValueError without a chat template, and where the template writes the text before a turn
    otherwise when the turn follows.
    """
    if not reader.has_template:
        raise ValueError(
            f"messages is a list of messages, but the tokenizer {reader.tokenizer.name_or_path!r} has no "
            "chat template, or data.chat_template is none; give a template file as data.chat_template"
        )
    shown = _with_system(messages, reader.data.system)
    shift = len(shown) - len(messages)
    places = [position for position in range(first + shift, len(shown)) if _is_answer(shown, position)]
    turns = [_turn(shown, place, reader, inputs) for place in places]
    if not all(set(turn.tokens) - set(reader.stop) for turn in turns):
        return []

    for turn in turns:
        reader.losses["completions"].add(turn.text, turn.tokens, reader.tokenizer)
    conversation = turns[-1].before + turns[-1].text
    if all(turn.has_end and conversation.startswith(turn.before + turn.text) for turn in turns[:-1]):
        return [_joined_row(turns, reader)]
    return [
        ConversationRow(_encode_prompt(turn.before, reader), turn.tokens, (True,) * len(turn.tokens))
        for turn in turns
    ]


def _is_answer(messages: Sequence[Message], position: int) -> bool:
    """Whether the message is the assistant's and another role spoke before it, the system's apart."""
    earlier = {message["role"] for message in messages[:position]}
    return messages[position]["role"] == "assistant" and bool(earlier - {"system"})


def _with_system(messages: Sequence[Message], system: str | None) -> list[Mapping[str, Any]]:
    if system is None:
        return list(messages)
    if messages[0]["role"] == "system":
        raise ValueError(
            "the conversation has its own system message and data.system is set; unset data.system"
        )
    return [{"role": "system", "content": system}, *messages]


def _turn(messages: Sequence[Message], place: int, reader: Reader, inputs: TemplateInputs) -> _Turn:
    date = reader.data.date
    before = apply_template(messages[:place], reader.tokenizer, date, inputs, add_generation_prompt=True)
    after = apply_template(messages[: place + 1], reader.tokenizer, date, inputs)
    if not after.startswith(before):
        raise ValueError(
            f"the chat template writes the text before message {place} otherwise when the assistant's answer "
            "follows, so the answer cannot be separated; choose another template as data.chat_template, or "
            "columns prompt and completion of text with data.chat_template none"
        )
    text = after[len(before) :]
    token_ids = _encode(text, reader)
    tokens = reader.with_single_end(token_ids)
    rest = str(reader.tokenizer.decode(list(token_ids[len(tokens) :])))
    has_end = token_ids[: len(tokens)] == tokens and text.endswith(rest)
    return _Turn(before, text.removesuffix(rest) if has_end else text, tokens, has_end)


def _joined_row(turns: Sequence[_Turn], reader: Reader) -> ConversationRow:
    completion: list[int] = []
    scored: list[bool] = []
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        between: tuple[int, ...] = ()
        if following is not None:
            between = _encode(following.before[len(turn.before + turn.text) :], reader)
        completion += [*turn.tokens, *between]
        scored += [True] * len(turn.tokens) + [False] * len(between)
    return ConversationRow(_encode_prompt(turns[0].before, reader), tuple(completion), tuple(scored))


def _encode_prompt(text: str, reader: Reader) -> tuple[int, ...]:
    token_ids = _encode(text, reader)
    if not token_ids:
        raise ValueError("the text before the assistant's first turn has no tokens; give it a user's message")
    reader.losses["prompts"].add(text, token_ids, reader.tokenizer)
    return token_ids


def _encode(text: str, reader: Reader) -> tuple[int, ...]:
    return tuple(reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
