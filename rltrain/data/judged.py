"""Common parts of the loaders for judged completions: reading rows, encoding text and messages, cutting texts
that are too long.

A completion ends with the token that ends a turn, like a sampled one. Prompt and completion are tokenised
separately, because a policy continues the tokens of the prompt. A prompt that is too long loses its beginning
(its BOS stays); a completion loses its end.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rltrain.config.schema import JudgedData
from rltrain.data.chat import (
    Message,
    TemplateInputs,
    apply_template,
    prompt_messages,
    read_messages,
    render,
    template_inputs,
    uses_template,
)
from rltrain.data.prompts import rename_columns, side_of
from rltrain.data.rows import Row, read_rows
from rltrain.data.tasks import TASKS
from rltrain.round_trip import LOSSY, Losses
from rltrain.seeds import stable_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[Message]  # as written in the data set
Side = Literal["train", "eval"]
Counts = Counter[str]
CONVERSATIONS = "conversations"  # form of rows with a column ``messages``


@dataclass(frozen=True)
class Reader:
    """Turns prompts and completions of one data set into token ids."""

    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]  # token ids that end a completion
    data: JudgedData
    losses: Mapping[str, Losses] = field(
        default_factory=lambda: {"prompts": Losses(), "completions": Losses()}
    )

    @property
    def has_template(self) -> bool:
        return uses_template(self.tokenizer, self.data)

    def inputs_of(self, row: Row) -> TemplateInputs:
        """What the chat template receives beside the row's messages."""
        return template_inputs(row.columns, self.data)

    def encode_prompt(self, prompt: Text, inputs: TemplateInputs) -> tuple[str, tuple[int, ...]]:
        """(text, token ids) of the prompt as the model receives it, uncut."""
        text, token_ids = render(
            prompt,
            self.tokenizer,
            system=self.data.system,
            chat_template=self.data.chat_template,
            date=self.data.date,
            inputs=inputs,
        )
        self.losses["prompts"].add(text, token_ids, self.tokenizer)
        return text, tuple(token_ids)

    def encode_completion(
        self, prompt: Text, prompt_text: str, completion: Text, inputs: TemplateInputs
    ) -> tuple[int, ...]:
        """Token ids of ``completion`` after ``prompt``; () if it consists of end tokens only.

        prompt_text: ``prompt`` as formatted by the template with ``inputs``.
        """
        text = (
            self._completion_text(prompt, prompt_text, completion, inputs)
            if self.has_template
            else completion
        )
        if not isinstance(text, str):
            raise ValueError(
                f"the completion is a list of messages, but the tokenizer {self.tokenizer.name_or_path!r} "
                "has no chat template"
            )
        token_ids = tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not set(token_ids) - set(self.stop):
            return ()
        self.losses["completions"].add(text, token_ids, self.tokenizer)
        return self.with_single_end(token_ids)

    def _completion_text(
        self, prompt: Text, prompt_text: str, completion: Text, inputs: TemplateInputs
    ) -> str:
        """The text that the template writes after the prompt. The generation prompt belongs to the prompt."""
        question = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else [dict(message) for message in prompt]
        )
        answer = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else [dict(message) for message in completion]
        )
        system = [] if self.data.system is None else [{"role": "system", "content": self.data.system}]

        messages = [*system, *question, *answer]
        conversation = apply_template(messages, self.tokenizer, self.data.date, inputs)
        if not conversation.startswith(prompt_text):
            raise ValueError(
                "the chat template formats the prompt differently when an answer follows, so the policy's "
                "part cannot be separated; set data.chat_template to none and write prompts as text"
            )
        return conversation[len(prompt_text) :]

    def with_single_end(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """``token_ids`` with one end token at the end. Blank text and further end tokens that some templates
        write after it are removed, because the policy does not produce them.
        """
        for position, token in enumerate(token_ids):
            if token in self.stop:
                rest = [later for later in token_ids[position + 1 :] if later not in self.stop]
                if not str(self.tokenizer.decode(rest)).strip():
                    return token_ids[: position + 1]
        return (*token_ids, self._end_token)

    @property
    def _end_token(self) -> int:
        eos: Any = self.tokenizer.eos_token_id
        return int(eos) if eos is not None else self.stop[0]

    def with_empty_counts(self) -> Reader:
        """The same reader with empty counts, for another side of the data."""
        return Reader(self.tokenizer, self.stop, self.data)

    def count_lossy(self, source: str) -> Counts:
        """How many texts lost characters in tokenisation. Raises ValueError if too much is lost."""
        for losses in self.losses.values():
            losses.check(source, self.tokenizer)
        return Counter({f"{kind} {LOSSY}": losses.lossy for kind, losses in self.losses.items()})

    def cut_prompt(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The last tokens of a prompt within the limit, after its BOS if it has one."""
        limit = self.data.max_prompt_tokens
        if len(token_ids) <= limit:
            return token_ids
        bos = token_ids[:1] if token_ids[0] == self.tokenizer.bos_token_id else ()
        return (
            bos + token_ids[len(token_ids) - limit + len(bos) :] if limit > len(bos) else token_ids[-limit:]
        )


# rows -------------------------------------------------------------------------------------------------------


def judged_rows(data: JudgedData, side: Side) -> tuple[str, list[Row]]:
    """(source, rows that match ``where``), with renamed columns and in the order of the data set."""
    source, split, subset, columns = side_of(data, side)
    if source is None:
        raise ValueError(
            "data.eval is not set, so there are no held-out examples; set it to a data set, a file or a "
            "built-in task"
        )

    # The options of a built-in task do not apply to a held-out file.
    options = data.options if source in TASKS or data.train not in TASKS else {}
    rows = [
        rename_columns(row, columns) for row in read_rows(source, split=split, subset=subset, options=options)
    ]

    where = data.where if side == "train" or data.eval_where is None else data.eval_where
    for column, value in where.items():
        values = {str(row.columns.get(column)) for row in rows}
        rows = [row for row in rows if row.columns.get(column) == value]
        if not rows:
            key = "data.where" if side == "train" or data.eval_where is None else "data.eval_where"
            raise ValueError(
                f"{source}: no row has {column} = {value!r} ({key}); there are "
                f"{', '.join(sorted(values)[:8])}"
            )
    return source, rows


def shuffle_rows(rows: Sequence[Row], seed: int, source: str, limit: int | None) -> Sequence[Row]:
    """The rows in a seeded random order if there is a limit, and in their own order otherwise."""
    return (
        rows if limit is None else random.Random(stable_hash("judged", seed, source)).sample(rows, len(rows))
    )


def holds_a_pair(row: Row) -> bool:
    """Whether the row has both completions of a pair; one of the columns alone says nothing."""
    return {"chosen", "rejected"} <= row.columns.keys()


def form_of(row: Row) -> str:
    """The format of the row's examples, in words for error messages.

    Raises ValueError if the row has none of the known formats.
    """
    columns = row.columns
    if holds_a_pair(row):
        kinds = {_content_kind(row, name) for name in ("chosen", "rejected")}
        if len(kinds) > 1:
            raise ValueError(
                f"{row.where}: one of chosen and rejected is text and the other a list of messages; write "
                "both alike"
            )
        kind = kinds.pop()
        prompt = _content_kind(row, "prompt") if columns.get("prompt") is not None else None
        if prompt is None or (prompt, kind) == (
            "text",
            "messages",
        ):  # as in UltraFeedback, whose messages repeat the prompt
            transcript = kind == "text" and all(
                _is_transcript(columns[name]) for name in ("chosen", "rejected")
            )
            return (
                "pairs of Human/Assistant transcripts"
                if transcript
                else f"pairs of {kind} that begin with their prompt"
            )
        return f"pairs of {kind} with a prompt of {prompt}"

    if "completion" in columns:
        if columns.get("prompt") is None:
            raise ValueError(
                f"{row.where}: no prompt beside the completion; there are {sorted(columns)}; name its column "
                "in data.columns"
            )
        kind = _content_kind(row, "completion")
        return f"completions of {kind} with a prompt of {_content_kind(row, 'prompt')}"
    if "messages" in columns:
        if (kind := _content_kind(row, "messages")) == "text":
            raise ValueError(
                f"{row.where}: messages is text; a list of mappings with 'role' and 'content' is expected"
            )
        return CONVERSATIONS
    raise ValueError(
        f"{row.where}: neither chosen and rejected nor completion nor messages; there are {sorted(columns)}; "
        "name the right ones in data.columns, e.g. {chosen: better, rejected: worse}"
    )


def require_one_form(rows: Sequence[Row]) -> str:
    """The common format of all rows. Raises ValueError, naming two rows, if formats differ."""
    first = form_of(rows[0])
    for row in rows:
        if (form := form_of(row)) != first:
            raise ValueError(
                f"mixed formats: {rows[0].where} holds {first}, {row.where} {form}; use one format, or "
                "data.where"
            )
    return first


def _content_kind(row: Row, name: str) -> Literal["text", "messages"]:
    value = row.columns[name]
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "messages"
    raise ValueError(
        f"{row.where}: {name} is {type(value).__name__} ({value!r:.80}); text or a list of messages is "
        "expected"
    )


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


# contents ---------------------------------------------------------------------------------------------------


def format_prompt(row: Row, data: JudgedData) -> Text:
    """The prompt column: text put into the template, or unchanged messages."""
    prompt = row.columns["prompt"]
    if _content_kind(row, "prompt") == "text":
        if not prompt.strip():
            raise ValueError(
                f"{row.where}: the prompt is empty; remove the row or name another column in data.columns"
            )
        try:
            return data.prompt_template.format_map(row.columns)
        except (KeyError, ValueError, IndexError) as error:
            problem = f"data.prompt_template {data.prompt_template!r}: {error!r}"
            raise ValueError(f"{problem}; {row.where} has the columns {sorted(row.columns)}") from error
    return checked_prompt_messages(row, "prompt", prompt, data)


def checked_prompt_messages(row: Row, name: str, messages: Sequence[Any], data: JudgedData) -> list[Message]:
    """``messages`` as text. Raises ValueError unless they are valid messages of a prompt."""
    try:
        result = prompt_messages(messages)
    except ValueError as error:
        raise ValueError(f"{row.where}: {name}: {error}") from error
    if data.system is not None and result[0]["role"] == "system":
        raise ValueError(
            f"{row.where}: the prompt has its own system message and data.system is set; unset data.system"
        )
    return result


def completion_of(row: Row, name: str) -> Text:
    """The column of a completion: text, or messages with their content as text; an empty list stays one."""
    value = row.columns[name]
    if _content_kind(row, name) == "text" or not value:
        return value
    try:
        return read_messages(value)
    except ValueError as error:
        raise ValueError(f"{row.where}: {name}: {error}") from error


def is_empty(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in completion)


def numeric_value(row: Row, name: str) -> float | None:
    """A numeric column; None if it is absent, empty or not finite. Raises ValueError if it is no number."""
    value = row.columns.get(name)
    if value is None:
        return None
    if isinstance(value, str | list | dict):
        raise ValueError(
            f"{row.where}: {name} is {type(value).__name__} ({value!r:.40}); a number is expected"
        )
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{row.where}: {name} is {value!r:.40} ({type(value).__name__}); a number that fits into a float "
            "is expected"
        ) from error
    return result if math.isfinite(result) else None


def reference_logps(row: Row, *column_sets: tuple[str, ...]) -> tuple[float, ...] | None:
    """Log-probs of a reference model from the data, as TRL writes them: the first of ``column_sets`` that the
    row has.

    Raises ValueError if the row has only some columns of a set or a value is not a finite number.
    """
    for columns in column_sets:
        if not set(columns) & row.columns.keys():
            continue
        logps = [numeric_value(row, name) for name in columns]
        if any(value is None for value in logps):
            raise ValueError(
                f"{row.where}: reference log-probs need a finite number in {' and '.join(columns)}, got "
                f"{[row.columns.get(name) for name in columns]}; correct the row, or drop these columns to "
                "have them computed"
            )
        return tuple(value for value in logps if value is not None)
    return None


def require_all_or_none(source: str, logps: Sequence[object | None]) -> None:
    """Raises ValueError if only some rows have log-probs of the reference."""
    without = sum(logp is None for logp in logps)
    if 0 < without < len(logps):
        raise ValueError(
            f"{source}: {without} of {len(logps)} examples have no reference log-probs and the others do; "
            "drop the columns"
        )


def numeric_columns(row: Row, needs: frozenset[str]) -> Mapping[str, float]:
    """The columns that a loss needs, from ``column:<name>``. Raises ValueError if one is missing."""
    numbers: dict[str, float] = {}
    for need in sorted(needs):
        kind, _, name = need.partition(":")
        if kind == "column":
            value = numeric_value(row, name)
            if value is None:
                raise ValueError(
                    f"{row.where}: the loss needs a number in column {name!r}; there are "
                    f"{sorted(row.columns)} (data.columns)"
                )
            numbers[name] = value
    return numbers


def no_examples_error(source: str, rows: int, dropped: Counts) -> ValueError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return ValueError(
        f"{source}: no example is left of {rows} ({reasons}); check the rows, data.columns and the limits on "
        "tokens"
    )
