"""Loads prompts for the rollout stage: each is checked, rendered and tokenised once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rltrain.config.schema import Data, Source
from rltrain.data.chat import Message, prompt_messages, render, template_inputs
from rltrain.data.gsm8k import calculator_steps
from rltrain.data.rows import Row, read_rows
from rltrain.data.tasks import TASKS
from rltrain.round_trip import Losses
from rltrain.seeds import stable_hash
from rltrain.types.samples import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptSet:
    """Prompts, the numbers left out by reason (``too_long``, ``repeated``, ``malformed``, ``shared``), and
    the number that lose characters in tokenisation.
    """

    prompts: tuple[Prompt, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    lossy: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(
    data: Data,
    side: Literal["train", "eval"],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    limit: int | None = None,
) -> PromptSet:
    """The training or held-out prompts of ``data``; with ``limit``, at most this many, the first ones that
    fit after a seeded shuffle.

    Without a limit the order is that of the data set. Every row is checked before any is tokenised. Raises
    ValueError, naming file and line, if a row is malformed, and if no prompt is left.
    """
    source, rows, contents, dropped = load_rows(data, side)
    order = range(len(rows))
    if limit is not None:
        order = random.Random(stable_hash("prompts", seed, source)).sample(order, len(rows))

    prompts: list[Prompt] = []
    losses = Losses()
    for index in order:
        if limit is not None and len(prompts) == limit:
            break
        prompt = _make_prompt(rows[index], contents[index], data, tokenizer)
        if prompt is None:
            dropped["too_long"] += 1
            continue
        prompts.append(prompt)
        losses.add(prompt.text, prompt.token_ids, tokenizer)

    if not prompts:
        raise ValueError(
            f"{source}: no prompt is left of {len(rows)} ({dict(dropped)} dropped); data.max_prompt_tokens "
            f"is {data.max_prompt_tokens}, raise it if they are too long"
        )
    losses.check(source, tokenizer)
    return PromptSet(tuple(prompts), dict(dropped), losses.lossy)


def load_rows(
    data: Data, side: Literal["train", "eval"]
) -> tuple[str, list[Row], list[str | list[Message]], Counter[str]]:
    """(source, rows, the checked content of each, numbers left out by reason), before any is tokenised.

    Raises ValueError, naming file and line, if a row is malformed.
    """
    source, split, subset, columns = side_of(data, side)
    if source is None:
        raise ValueError(
            "data.eval is not set, so there are no held-out prompts; set it to a data set, a file or a "
            "built-in task"
        )

    # The options of a built-in task do not apply to a held-out file.
    options = data.options if source in TASKS or data.train not in TASKS else {}
    read = read_rows(source, split=split, subset=subset, options=options)
    rows, dropped = _apply_adapter([rename_columns(row, columns) for row in read], data.adapter)
    return source, rows, [_check_content(row, data) for row in rows], dropped


def side_of(
    data: Source, side: Literal["train", "eval"]
) -> tuple[str | None, str, str | None, Mapping[str, str]]:
    """(source, split, subset, columns); the held-out side inherits missing values from the training side."""
    if side == "train":
        return data.train, data.train_split, data.subset, data.columns
    columns = data.columns if data.eval_columns is None else data.eval_columns
    return data.eval, data.eval_split, data.eval_subset or data.subset, columns


def without_prompts(prompts: PromptSet, others: PromptSet) -> PromptSet:
    """``prompts`` without those that have the same token ids as one of ``others``; they are counted as
    ``shared``.
    """
    reserved = {prompt.token_ids for prompt in others.prompts}
    kept = tuple(prompt for prompt in prompts.prompts if prompt.token_ids not in reserved)
    if not kept:
        raise ValueError(
            f"each of the {len(prompts)} prompts (first {prompts.prompts[0].id}) is also among the "
            f"{len(others)} others, none is left; training and held-out data are the same: set data.eval to "
            "other data or another split"
        )
    return PromptSet(kept, {**prompts.dropped, "shared": len(prompts) - len(kept)}, prompts.lossy)


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with columns renamed: ``columns`` maps our name to the name in the file.

    A name with dots may lead into a column that holds a mapping. Other columns keep their names.
    """
    taken = set(columns.values())

    kept = {name: value for name, value in row.columns.items() if name not in taken}
    renamed = {name: _column_value(row, name, column) for name, column in columns.items()}
    return Row(row.id, row.where, kept | renamed)


def _column_value(row: Row, name: str, column: str) -> Any:
    """The value of ``column``, which is a column's name or a path into one (``reward_model.ground_truth``).

    Raises ValueError if there is none. name: what it is called here.
    """
    if column in row.columns:
        return row.columns[column]
    value: Any = row.columns
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(
                f"{row.where}: no column {column!r} for {name!r} (data.columns); there are "
                f"{sorted(row.columns)}"
            )
        value = value[part]
    return value


def _apply_adapter(
    rows: Sequence[Row], adapter: Literal["none", "gsm8k_calculator"]
) -> tuple[list[Row], Counter[str]]:
    if adapter == "none":
        return list(rows), Counter(too_long=0)
    steps, left_out = calculator_steps(rows)
    if not steps:
        raise ValueError(
            f"{rows[0].where}: no calculator annotation such as <<48/2=24>> in any 'answer'; is data.adapter "
            "meant for this data?"
        )
    left_out.update(too_long=0)
    return steps, left_out


def _check_content(row: Row, data: Data) -> str | list[Message]:
    """The checked content of the prompt: text put into the template, or unchanged messages."""
    if "prompt" not in row.columns:
        raise ValueError(
            f"{row.where}: no column 'prompt'; there are {sorted(row.columns)}; name the right one in "
            "data.columns, e.g. prompt: question"
        )
    prompt = row.columns["prompt"]
    if isinstance(prompt, list):
        try:
            messages = prompt_messages(prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: prompt: {error}") from error
        if data.system is not None and messages[0]["role"] == "system":
            raise ValueError(
                f"{row.where}: the prompt has its own system message and data.system is set; unset "
                "data.system"
            )
        return messages
    if not isinstance(prompt, str):
        raise ValueError(
            f"{row.where}: prompt is {type(prompt).__name__} ({prompt!r:.80}); text or a list of messages is "
            "expected"
        )
    if not prompt.strip():
        raise ValueError(
            f"{row.where}: prompt is empty; remove the row or name another column in data.columns"
        )
    try:
        return data.prompt_template.format_map(row.columns)
    except KeyError as error:
        raise ValueError(
            f"data.prompt_template asks for {error}; {row.where} has the columns {sorted(row.columns)}"
        ) from error
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"data.prompt_template {data.prompt_template!r}: {error}; write {{prompt}} for the prompt, {{{{ "
            "}} for braces"
        ) from error


def _make_prompt(
    row: Row, content: str | list[Message], data: Data, tokenizer: PreTrainedTokenizerBase
) -> Prompt | None:
    """The row's prompt; None if it is longer than ``data.max_prompt_tokens``."""
    try:
        text, token_ids = render(
            content,
            tokenizer,
            system=data.system,
            chat_template=data.chat_template,
            date=data.date,
            inputs=template_inputs(row.columns, data),
        )
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    if len(token_ids) > data.max_prompt_tokens:
        return None
    others: dict[str, Any] = {name: value for name, value in row.columns.items() if name != "prompt"}
    return Prompt(
        row.id, tuple(token_ids), text, others, None if isinstance(content, str) else _messages(content, data)
    )


def _messages(content: Sequence[Message], data: Data) -> tuple[Message, ...]:
    """The conversation that the policy answers."""
    system = [] if data.system is None else [{"role": "system", "content": data.system}]
    return (*system, *content)
