"""Scored groups as a table with a row for each completion, and back: every field, to the bit."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from rltrain.checkpoint.plain_values import decode_value, encode_value
from rltrain.errors import UserError
from rltrain.reward.score import Episode, Score
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span, TokenSets

__all__ = ["SCHEMA", "groups_of_table", "require_columns", "table_of_groups"]

_SPAN = [pa.field("start", pa.int32()), pa.field("stop", pa.int32())]
_NUMBERS = pa.map_(pa.string(), pa.float64())
_EPISODE = pa.struct(
    [
        pa.field("reward", pa.float64()),
        pa.field("parts", _NUMBERS),
        pa.field("turns", pa.list_(pa.string())),
        pa.field("failure", pa.string()),
    ]
)
_KEPT = pa.struct(
    [
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("sizes", pa.list_(pa.int32())),
        pa.field("mass", pa.list_(pa.float32())),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64()),
        pa.field("sample", pa.int32()),  # number of the completion in its group, from 0
        pa.field("prompt_id", pa.string()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
        pa.field("prompt_text", pa.string()),
        pa.field("prompt_columns", pa.string()),  # JSON
        pa.field("prompt_messages", pa.string()),  # JSON
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("logprobs", pa.list_(pa.float64())),  # nats; float32 numbers of an engine take half the room
        pa.field("finish", pa.string()),
        pa.field("text", pa.string()),
        pa.field("versions", pa.list_(pa.struct([*_SPAN, pa.field("version", pa.int64())]))),
        pa.field("source", pa.int32()),
        pa.field("turns", pa.list_(pa.struct(_SPAN))),
        pa.field("episode", _EPISODE),
        pa.field("kept", _KEPT),  # the tokens that each token was drawn from
        pa.field("worker", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("reward_parts", _NUMBERS),
        pa.field("ungraded", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("why", pa.string()),
        pa.field("extra", pa.map_(pa.string(), pa.string())),
    ]
)


def require_columns(prompts: Sequence[Prompt]) -> None:
    """Raises UserError where a prompt's columns hold what a journal cannot keep."""
    for prompt in prompts:
        _encode_prompt(prompt)


def table_of_groups(groups: Sequence[ScoredGroup]) -> pa.Table:
    """A row for each completion, in the order of the groups.

    Half a surrogate pair, which UTF-8 does not have, is written as its escape. Raises UserError for columns
    that cannot be kept, and ValueError for a group without completions.
    """
    rows = [row for group in groups for row in _rows(group)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _rows(group: ScoredGroup) -> Iterator[dict[str, Any]]:
    if not group.completions:
        raise ValueError(f"group {group.group} has no completion, so it has no row in a journal")
    shared = {"group": group.group, **_encode_prompt(group.prompt)}
    for place, (completion, score) in enumerate(zip(group.completions, group.scores, strict=True)):
        episode = completion.episode
        yield {
            **shared,
            "sample": place,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish": completion.finish,
            "text": _utf8(completion.text),
            "versions": [
                {"start": span.start, "stop": span.stop, "version": span.version}
                for span in completion.versions
            ],
            "source": completion.source,
            "turns": [{"start": start, "stop": stop} for start, stop in completion.turns],
            "episode": None if episode is None else _encode_episode(episode),
            "kept": None if completion.kept is None else _encode_kept(completion.kept),
            "worker": _utf8(completion.worker),
            "reward": score.value,
            "reward_parts": _pairs(score.parts),
            "ungraded": _optional(score.ungraded),
            "answer": _optional(score.answer),
            "why": _optional(score.why),
            "extra": [(_utf8(name), _utf8(text)) for name, text in score.extra.items()],
        }


def _encode_prompt(prompt: Prompt) -> dict[str, Any]:
    try:
        columns = encode_value(dict(prompt.columns))
        messages = None if prompt.messages is None else encode_value([*map(dict, prompt.messages)])
    except TypeError as error:
        raise UserError(
            f"prompt {prompt.id!r}: a column or message holds {error}, which the journal of rollouts cannot "
            "keep; leave the column out of the data, or set journal.keep to nothing"
        ) from error
    return {
        "prompt_id": _utf8(prompt.id),
        "prompt_token_ids": prompt.token_ids,
        "prompt_text": _utf8(prompt.text),
        "prompt_columns": columns,
        "prompt_messages": messages,
    }


def _encode_kept(kept: TokenSets) -> dict[str, Any]:
    return {"ids": list(kept.ids), "sizes": list(kept.sizes), "mass": list(kept.mass)}


def _encode_episode(episode: Episode) -> dict[str, Any]:
    return {
        "reward": episode.reward,
        "parts": _pairs(episode.parts),
        "turns": [*map(_utf8, episode.turns)],
        "failure": _optional(episode.failure),
    }


def _pairs(numbers: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(_utf8(name), float(value)) for name, value in numbers.items()]


def _utf8(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _optional(text: str | None) -> str | None:
    return None if text is None else _utf8(text)


def groups_of_table(table: pa.Table) -> tuple[ScoredGroup, ...]:
    """The groups that ``table_of_groups`` was given. Raises ValueError for another table."""
    if not table.schema.equals(SCHEMA):
        raise ValueError("the columns are not those of a journal of rollouts")
    groups: list[ScoredGroup] = []
    for number, rows in groupby(table.to_pylist(), key=lambda row: row["group"]):
        pairs = [(row, _completion(row), _score(row)) for row in rows]
        completions = tuple(completion for _, completion, _ in pairs)
        groups.append(
            ScoredGroup(number, _prompt(pairs[0][0]), completions, tuple(score for _, _, score in pairs))
        )
    return tuple(groups)


def _prompt(row: Mapping[str, Any]) -> Prompt:
    messages = row["prompt_messages"]
    return Prompt(
        row["prompt_id"],
        tuple(row["prompt_token_ids"]),
        row["prompt_text"],
        decode_value(row["prompt_columns"]),
        None if messages is None else tuple(decode_value(messages)),
    )


def _completion(row: Mapping[str, Any]) -> Completion:
    episode = row["episode"]
    kept = row["kept"]
    return Completion(
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        finish=row["finish"],
        text=row["text"],
        versions=tuple(Span(span["start"], span["stop"], span["version"]) for span in row["versions"]),
        source=row["source"],
        turns=tuple((span["start"], span["stop"]) for span in row["turns"]),
        episode=None
        if episode is None
        else Episode(episode["reward"], dict(episode["parts"]), tuple(episode["turns"]), episode["failure"]),
        kept=None
        if kept is None
        else TokenSets(array("i", kept["ids"]), array("i", kept["sizes"]), array("f", kept["mass"])),
        worker=row["worker"],
    )


def _score(row: Mapping[str, Any]) -> Score:
    return Score(
        value=row["reward"],
        parts=dict(row["reward_parts"]),
        ungraded=row["ungraded"],
        answer=row["answer"],
        why=row["why"],
        extra=dict(row["extra"]),
    )
