"""Turns text and messages into token ids, and finds the tokens that end a completion."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from rltrain.chat_template import frozen_clock
from rltrain.config.schema import check_template_kwargs
from rltrain.json_text import parse_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from rltrain.config.schema import Data, Source

ROLES = ("system", "user", "assistant", "tool")
# A template is a program: what its own raise_exception, its operators and its loops can end in.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
Message = Mapping[str, Any]
# columns of a row that its chat template reads, as in TRL's data sets
TOOLS = "tools"
TEMPLATE_KWARGS = "chat_template_kwargs"


@dataclass(frozen=True, slots=True)
class StopTokens:
    """Token ids that end or fill a row.

    Masks are made from lengths, not from these ids: the pad only has to be a valid id.
    """

    stop: tuple[int, ...]  # ascending; sampling any of them ends a completion
    pad: int
    pad_is_eos: bool  # the tokenizer defines no pad token, so an EOS token is used


@dataclass(frozen=True, slots=True)
class TemplateInputs:
    """What a chat template receives beside the messages."""

    tools: Sequence[Mapping[str, Any]] = ()  # JSON schemas of functions that the answer may call
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # further variables, e.g. enable_thinking

    def __bool__(self) -> bool:
        return bool(self.tools or self.kwargs)


def template_inputs(columns: Mapping[str, Any], data: Source) -> TemplateInputs:
    """The inputs of a row: its columns ``tools`` and ``chat_template_kwargs`` (as JSON text too), the latter
    over ``data.chat_template_kwargs``. Raises ValueError if a column holds something else.
    """
    tools = _parsed_column(columns, TOOLS)
    if not isinstance(tools, list | None) or not all(isinstance(tool, Mapping) for tool in tools or ()):
        raise ValueError(
            f"tools is {tools!r:.80}; a list of JSON schemas of functions is expected; rename a column that "
            f"means something else with data.columns, e.g. {{equipment: {TOOLS}}}"
        )
    kwargs = _parsed_column(columns, TEMPLATE_KWARGS)
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(
            f"{TEMPLATE_KWARGS} is {kwargs!r:.80}; a mapping such as {{enable_thinking: false}} is expected"
        )
    check_template_kwargs({str(name): value for name, value in (kwargs or {}).items()})
    # a table stores the union of all rows' keys and fills the others with null
    named = {name: value for name, value in (kwargs or {}).items() if value is not None}
    return TemplateInputs(tuple(tools or ()), {**data.chat_template_kwargs, **named})


def _parsed_column(columns: Mapping[str, Any], name: str) -> Any:
    """The column's value, with JSON text parsed; None for an absent or blank one."""
    value = columns.get(name)
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{name} is text, but not JSON ({error}): {value!r:.80}") from error


def uses_template(tokenizer: PreTrainedTokenizerBase, data: Source) -> bool:
    """Whether texts and messages go through a chat template."""
    return data.chat_template != "none" and tokenizer.chat_template is not None


def stop_tokens_of(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> StopTokens:
    """Stop and pad ids.

    Raises ValueError if neither the tokenizer nor the generation config names an EOS.
    """
    stop = stop_token_ids(tokenizer, generation_config)
    if not stop:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token and the model's generation config "
            "names none, so no answer could ever stop; set eos_token in tokenizer_config.json (or "
            "eos_token_id in generation_config.json) to the token that ends an answer"
        )
    pad: Any = tokenizer.pad_token_id
    return StopTokens(stop=stop, pad=stop[0] if pad is None else pad, pad_is_eos=pad is None)


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """The EOS ids of the tokenizer and of the generation config, ascending. Chat models often define a second
    EOS in the generation config.
    """
    named: Any = None if generation_config is None else generation_config.eos_token_id
    eos: Any = tokenizer.eos_token_id
    configured = named if isinstance(named, Iterable) else (named,)
    return tuple(sorted({int(token) for token in (eos, *configured) if token is not None}))


def render(
    prompt: str | Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None,
    chat_template: str,
    date: dt.date | None = None,
    inputs: TemplateInputs = TemplateInputs(),
) -> tuple[str, list[int]]:
    """(text, token ids) of the prompt as the model receives it, generation prompt included.

    With a chat template, text becomes one user message. Without one, text is tokenised unchanged, after the
    tokenizer's BOS if the tokenizer adds one. No end token is appended. date: the date that the template
    prints; None: today. Raises ValueError for messages, a system message or tools if there is no chat
    template.
    """
    if chat_template != "none" and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        text = apply_template(messages, tokenizer, date, inputs, add_generation_prompt=True)
        # The template writes the BOS if the model needs one.
        return text, _require_tokens(text, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    if not isinstance(prompt, str) or system is not None or inputs:
        what = (
            "the prompt is a list of messages"
            if not isinstance(prompt, str)
            else "data.system is set"
            if system is not None
            else "there are tools"
            if inputs.tools
            else "chat_template_kwargs is set"
        )
        why = (
            "data.chat_template is none"
            if chat_template == "none"
            else f"the tokenizer {tokenizer.name_or_path!r} has no chat template"
        )
        raise ValueError(
            f"{what}, but {why}; use text prompts and data.prompt_template, or a tokenizer with a chat "
            "template"
        )
    return prompt, _require_tokens(prompt, _encode_plain_text(prompt, tokenizer), tokenizer)


def _require_tokens(text: str, token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``token_ids``. Raises ValueError where there are none, since a model must read something first."""
    if not token_ids:
        raise ValueError(
            f"the prompt {text!r:.80} has no tokens: the tokenizer {tokenizer.name_or_path!r} knows none of "
            "its characters; remove the row, or choose a model that reads this script"
        )
    return token_ids


def apply_template(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    date: dt.date | None,
    inputs: TemplateInputs = TemplateInputs(),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The messages formatted by the tokenizer's chat template, with ``date`` as the current date.

    Raises ValueError if the template refuses the messages, or shows the tools nowhere.
    """

    def format_with(tools: Sequence[Mapping[str, Any]]) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **inputs.kwargs,
            **frozen_clock(date),
        )
        return str(text)

    try:
        text = format_with(inputs.tools)
        shows_tools = not inputs.tools or text != format_with(())
    except _TEMPLATE_ERRORS as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses these messages "
            f"({type(error).__name__}: {str(error)[:200]}); write what it takes (roles in its order, a "
            "system message only where it knows one), or choose another template"
        ) from error
    if not shows_tools:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} shows no tools, and the row has "
            f"{len(inputs.tools)}; set data.chat_template to a template file that shows them, or rename the "
            f"column, e.g. data.columns: {{unused: {TOOLS}}}"
        )
    return text


def _encode_plain_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int) or tokenizer(text)["input_ids"][:1] != [bos] or token_ids[:1] == [bos]:
        return token_ids
    return [bos, *token_ids]


def prompt_messages(messages: Sequence[Any]) -> list[Message]:
    """``read_messages`` of a prompt.

    Raises ValueError unless the last one is from a user or a tool and not empty.
    """
    result = read_messages(messages)
    if result[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"the last message is from {result[-1]['role']!r}; a prompt ends with the user's message, "
            "which the policy answers"
        )
    if not result[-1]["content"].strip():
        raise ValueError("the last message is empty")
    return result


def read_messages(messages: Sequence[Any]) -> list[Message]:
    """The messages with their content as text. Parts of type text are joined; an assistant's content may be
    None beside its tool calls.

    Raises ValueError unless they are mappings with a known role and such a content.
    """
    if not messages:
        raise ValueError("the list of messages is empty; at least one user message is needed")
    result: list[Message] = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"message {position} is {message!r:.200}; each message is a mapping with 'role' and 'content'"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {position} has the unknown role {message['role']!r}; roles are {', '.join(ROLES)}"
            )
        content = _content_text(message["content"])
        if content is None and message["role"] == "assistant" and message.get("tool_calls"):
            content = ""
        if content is None:
            raise ValueError(
                f"message {position} has content of type {type(message['content']).__name__} "
                f"({message['content']!r:.80}); text is expected, or a list of parts such as "
                '{"type": "text", "text": ...}'
            )
        result.append({**message, "content": content})
    return result


def _content_text(content: Any) -> str | None:
    """The text of a message's content; None where it is no text."""
    if isinstance(content, list) and content:
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


# placeholders that no template would write by itself
_QUESTION = "rltrain-question"
_TURN = "rltrain-turn"
_REPLY = "rltrain-reply"


class Dialogue:
    """Formats an environment's messages between the policy's turns as the tokenizer's chat template does.

    The text around a message is taken from the template once. Each message is tokenised separately and
    inserted, so that no text of an environment can produce a special token and the policy's turns stay
    unchanged. Without a template only the message is inserted. role: chat role of the message.
    observation_tokens: longer messages are cut at their end. Raises ValueError if the template refuses the
    role or does not show an assistant's turn followed by such a message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Iterable[int],
        data: Data,
        *,
        role: Literal["user", "tool"],
        observation_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = frozenset(stop)
        self._data = data
        self._longest = observation_tokens
        self._before: tuple[int, ...] = ()
        self._after: tuple[int, ...] = ()
        if uses_template(tokenizer, data):
            self._before, self._after = (
                self._encode(text, special=True) for text in _message_frame(tokenizer, data, role)
            )

    def opening(self, text: str) -> tuple[str, tuple[int, ...]]:
        """(text, token ids) of the prompt with ``text`` inside ``data.prompt_template``. ``text`` is cut at
        its end until the prompt has at most ``data.max_prompt_tokens``.
        """
        ids = self._encode(text)
        while True:
            content = self._data.prompt_template.format_map({"prompt": text})
            shown, token_ids = render(
                content,
                self._tokenizer,
                system=self._data.system,
                chat_template=self._data.chat_template,
                date=self._data.date,
                inputs=template_inputs({}, self._data),
            )
            excess = len(token_ids) - self._data.max_prompt_tokens
            if excess <= 0 or not ids:
                return shown, tuple(token_ids)
            ids = ids[:-excess]
            text = str(self._tokenizer.decode(list(ids)))

    def observation(self, text: str, last: int) -> tuple[int, ...]:
        """The tokens between a turn that ended with token ``last`` and the next turn.

        The end token is not repeated if the policy has written it.
        """
        before = (
            self._before[1:]
            if last in self._stop and self._before and self._before[0] in self._stop
            else self._before
        )
        return (*before, *self._encode(text.strip())[: self._longest], *self._after)

    def _encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        return tuple(
            self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        )


def _message_frame(tokenizer: PreTrainedTokenizerBase, data: Data, role: str) -> tuple[str, str]:
    """(text before, text after) a message that a template writes between two turns of the assistant."""
    messages = [{"role": "system", "content": data.system}] if data.system is not None else []
    messages += [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _TURN},
        {"role": role, "content": _REPLY},
    ]

    try:
        inputs = template_inputs({}, data)
        text = apply_template(messages, tokenizer, data.date, inputs, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a {role!r} message after the "
            f"assistant's ({error}); set rollout.environment.role to another one"
        ) from error

    turn, _, rest = text.rpartition(_TURN)
    before, reply, after = rest.partition(_REPLY)
    if not turn or not reply:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} does not show an assistant's turn followed by "
            f"a {role!r} message; set rollout.environment.role to another one, or data.chat_template to none"
        )
    return before, after
