"""Loads single completions labelled desirable or undesirable: TRL's columns ``prompt``, ``completion``,
``label``; or whole conversations in a column ``messages``, in which the assistant's turns are scored.

A data set of preference pairs gives two completions per pair: chosen ones are desirable, rejected ones
undesirable. A loss that needs no label gets the chosen ones only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rltrain.config.schema import JudgedData
from rltrain.data.chat import Message
from rltrain.data.conversations import conversation_of, encode_conversation, has_assistant_turn
from rltrain.data.judged import (
    CONVERSATIONS,
    Counts,
    Reader,
    Side,
    completion_of,
    format_prompt,
    holds_a_pair,
    is_empty,
    judged_rows,
    no_examples_error,
    numeric_columns,
    reference_logps,
    require_all_or_none,
    require_one_form,
    shuffle_rows,
)
from rltrain.data.preferences import (
    CONTRADICTED,
    PAIR_REFERENCE,
    Sides,
    preference_of,
    refuse_swapped_columns,
    sides_of,
    tokens_of,
)
from rltrain.data.rows import Row
from rltrain.needs import LABEL

__all__ = ["LabelSet", "LabelledCompletion", "are_pairs", "load_labels"]


_REFERENCE = (("reference_logps",), ("ref_logps",))  # TRL's names


@dataclass(frozen=True, slots=True)
class LabelledCompletion:
    """One completion as token ids, not empty."""

    id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    label: float | None = None  # 1 desirable, 0 undesirable, or between; None: neither needed nor in the data
    columns: Mapping[str, float] = field(default_factory=dict)  # further numbers that a loss needs
    ref_logp: float | None = None  # nats, under a reference model, from the data
    # by completion token, whether the loss counts it; None: it counts all
    scored: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class LabelSet:
    """Completions, the numbers of rows left out by reason, and the numbers of changes to those kept."""

    completions: tuple[LabelledCompletion, ...]
    dropped: Mapping[str, int]
    changed: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def classes(self) -> tuple[int, int]:
        """Numbers of (desirable, undesirable) completions; a soft label counts for the closer class."""
        desirable = sum(
            completion.label is not None and completion.label > 0.5 for completion in self.completions
        )
        return desirable, sum(completion.label is not None for completion in self.completions) - desirable


def load_labels(
    data: JudgedData,
    side: Side,
    reader: Reader,
    *,
    seed: int,
    limit: int | None = None,
    needs: frozenset[str],
) -> LabelSet:
    """The training or held-out completions of ``data``; with ``limit``, at most this many, the first ones
    kept after a seeded shuffle.

    needs: what the loss needs from the data: "label", "column:<name>". Raises ValueError, naming file and
    line, if a row cannot be read or lacks something needed, if formats are mixed, if no row is left, and if
    labels are needed and all are equal.
    """
    source, rows = judged_rows(data, side)
    form = require_one_form(rows)
    pairs = holds_a_pair(rows[0])
    dropped = Counter[str]()
    changed = Counter[str]()
    reader = reader.with_empty_counts()

    if pairs:
        refuse_swapped_columns(source, rows)

    completions: list[LabelledCompletion] = []
    for row in shuffle_rows(rows, seed, source, limit):
        if limit is not None and len(completions) >= limit:
            break
        if pairs:
            completions += _read_pair(row, form, reader, needs, dropped, changed)
        elif form == CONVERSATIONS:
            completions += _read_messages(row, conversation_of(row), 0, reader, needs, dropped, changed)
        else:
            completions += _read_completion(row, reader, needs, dropped, changed)

    changed.update(reader.count_lossy(source))
    if not completions:
        raise no_examples_error(source, len(rows), dropped)
    require_all_or_none(source, [completion.ref_logp for completion in completions])

    labels = LabelSet(tuple(completions[:limit]), dict(dropped), dict(changed))
    if LABEL in needs and side == "train" and 0 in labels.classes:
        desirable, undesirable = labels.classes
        raise ValueError(
            f"{source}: {desirable} desirable and {undesirable} undesirable completions: the loss learns "
            "from the contrast of both; add the other kind, or map the right column with data.columns, e.g. "
            "{label: correct}"
        )
    return labels


def _read_completion(
    row: Row, reader: Reader, needs: frozenset[str], dropped: Counts, changed: Counts
) -> Sequence[LabelledCompletion]:
    """The row's completion; empty if the row is left out, which ``dropped`` then counts."""
    prompt = format_prompt(row, reader.data)
    completion = completion_of(row, "completion")
    if not isinstance(completion, str) and any(message["role"] != "assistant" for message in completion):
        question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*question, *completion]
        return _read_messages(row, messages, len(question), reader, needs, dropped, changed)
    label = label_of(row, needs)
    reason = "empty" if is_empty(completion) else None
    if reason is None:
        try:
            inputs = reader.inputs_of(row)
            prompt_text, token_ids = reader.encode_prompt(prompt, inputs)
            answer = reader.encode_completion(prompt, prompt_text, completion, inputs)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error

        limit = reader.data.max_completion_tokens
        kept = reader.cut_prompt(token_ids)
        completion_is_cut = len(answer) > limit
        prompt_is_cut = kept != token_ids
        if not answer:
            reason = "empty"
        elif (completion_is_cut or prompt_is_cut) and reader.data.too_long == "drop":
            reason = "too long"
        if reason is None:
            changed.update({"prompts cut": int(prompt_is_cut), "completions cut": int(completion_is_cut)})
            logps = reference_logps(row, *_REFERENCE)
            return (
                LabelledCompletion(
                    row.id,
                    kept,
                    answer[:limit],
                    label,
                    numeric_columns(row, needs),
                    None if logps is None else logps[0],
                ),
            )

    dropped[reason] += 1
    return ()


def _read_messages(
    row: Row,
    messages: Sequence[Message],
    first: int,
    reader: Reader,
    needs: frozenset[str],
    dropped: Counts,
    changed: Counts,
) -> list[LabelledCompletion]:
    """The row's conversation, whose assistant is scored from message ``first`` on, in as many rows as its
    template needs; empty if it is left out, which ``dropped`` then counts.
    """
    label = label_of(row, needs)
    if not has_assistant_turn(messages, first):
        dropped["without an answer"] += 1
        return []
    try:
        parts = encode_conversation(messages, reader, reader.inputs_of(row), first)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error

    limit = reader.data.max_completion_tokens
    is_cut = [(reader.cut_prompt(part.prompt) != part.prompt, len(part.completion) > limit) for part in parts]
    if not parts or (reader.data.too_long == "drop" and any(map(any, is_cut))):
        dropped["too long" if parts else "empty"] += 1
        return []
    prompts_cut, completions_cut = (sum(sides) for sides in zip(*is_cut, strict=True))
    changed.update({"prompts cut": prompts_cut, "completions cut": completions_cut})
    changed["turns in rows of their own"] += len(parts) if len(parts) > 1 else 0
    return [
        LabelledCompletion(
            row.id if len(parts) == 1 else f"{row.id}:turn {number}",
            reader.cut_prompt(part.prompt),
            part.completion[:limit],
            label,
            numeric_columns(row, needs),
            scored=None if all(part.scored[:limit]) else part.scored[:limit],
        )
        for number, part in enumerate(parts, start=1)
    ]


def _read_pair(
    row: Row, form: str, reader: Reader, needs: frozenset[str], dropped: Counts, changed: Counts
) -> Sequence[LabelledCompletion]:
    """Both completions of a pair; empty if the row is left out. A loss that needs no label gets only the
    chosen one, because it raises the likelihood of every completion.
    """
    sides = CONTRADICTED if preference_of(row) < 0 else sides_of(row, form, reader)
    pair = tokens_of(row, sides, reader, changed) if isinstance(sides, Sides) else sides
    if isinstance(pair, str):
        dropped[pair] += 1
        return ()

    columns = numeric_columns(row, needs)
    ref_chosen, ref_rejected = reference_logps(row, *PAIR_REFERENCE) or (None, None)
    chosen = LabelledCompletion(f"{row.id}:chosen", pair.prompt, pair.chosen, 1.0, columns, ref_chosen)
    if LABEL not in needs:
        return (chosen,)
    return chosen, LabelledCompletion(
        f"{row.id}:rejected", pair.prompt, pair.rejected, 0.0, columns, ref_rejected
    )


def label_of(row: Row, needs: frozenset[str]) -> float | None:
    """The label as a number from 0 to 1.

    Raises ValueError if it is neither such a number nor true or false, or if it is needed and missing.
    """
    label = row.columns.get("label")
    if label is None:
        if LABEL in needs:
            raise ValueError(
                f"{row.where}: the loss needs a label; there are {sorted(row.columns)}; name its column in "
                "data.columns"
            )
        return None
    if isinstance(label, bool | int | float) and 0 <= label <= 1:
        return float(label)
    raise ValueError(
        f"{row.where}: label is {label!r} ({type(label).__name__}); true, false or a number from 0 to 1 is "
        "expected"
    )


def are_pairs(labels: LabelSet) -> bool:
    """Whether completions 2i and 2i + 1 are the chosen and the rejected completion of a pair."""
    names = [first.id.rpartition(":") for first in labels.completions]
    return len(names) % 2 == 0 and all(
        (first[2], second[2]) == ("chosen", "rejected") and first[0] == second[0]
        for first, second in zip(names[::2], names[1::2], strict=True)
    )
