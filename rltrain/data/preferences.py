"""Loads preference pairs: a prompt and two completions, one of which is preferred.

Supported formats: TRL's columns ``prompt``, ``chosen``, ``rejected`` as text or messages; the two completions
alone, whose common beginning is then the prompt; and Anthropic's Human/Assistant transcripts. Strengths come
from ``margin``, from ``score_chosen`` and ``score_rejected`` (or ``chosen_rating`` and ``rejected_rating``),
or from ``p_chosen``. Every dropped row is counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from rltrain.config.schema import JudgedData
from rltrain.data.judged import (
    Counts,
    Reader,
    Side,
    Text,
    checked_prompt_messages,
    completion_of,
    format_prompt,
    holds_a_pair,
    is_empty,
    judged_rows,
    no_examples_error,
    numeric_columns,
    numeric_value,
    reference_logps,
    require_all_or_none,
    require_one_form,
    shuffle_rows,
)
from rltrain.data.rows import Row
from rltrain.loss.preference.margins import margins
from rltrain.needs import MARGIN, P_CHOSEN

__all__ = ["Pair", "PairSet", "load_pairs", "parse_transcript"]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
# TRL's names
PAIR_REFERENCE = (
    ("ref_chosen_logps", "ref_rejected_logps"),
    ("reference_chosen_logps", "reference_rejected_logps"),
)
CONTRADICTED = "contradicted by their scores"  # why a row is left out
_SCORES = (("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt as token ids. Neither is empty, and they differ."""

    id: str  # stable across runs: data set name and row
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float | None = None  # score of chosen minus score of rejected, at least 0
    p_chosen: float | None = None  # probability that chosen is the better one, at least 0.5
    columns: Mapping[str, float] = field(default_factory=dict)  # further numbers that a loss needs
    # nats, of chosen and rejected under a reference model, from the data
    ref_logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class PairSet:
    """Pairs, the numbers of rows left out by reason, and the numbers of changes to those kept."""

    pairs: tuple[Pair, ...]
    dropped: Mapping[str, int]
    changed: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.pairs)


class Sides(NamedTuple):
    """One pair as written in the data set."""

    prompt: Text
    chosen: Text
    rejected: Text


def load_pairs(
    data: JudgedData,
    side: Side,
    reader: Reader,
    *,
    seed: int,
    limit: int | None = None,
    needs: frozenset[str],
) -> PairSet:
    """The training or held-out pairs of ``data``; with ``limit``, at most this many, the first ones kept
    after a seeded shuffle.

    needs: what the loss needs from the data: "margin", "p_chosen", "column:<name>". Raises ValueError, naming
    file and line, if a row cannot be read or lacks something needed, if formats are mixed, and if no pair is
    left.
    """
    source, rows = judged_rows(data, side)
    form = require_one_form(rows)
    if not holds_a_pair(rows[0]):
        raise ValueError(
            f"{source} holds {form}, but the loss compares two completions of a prompt: columns chosen and "
            "rejected are needed"
        )
    dropped = Counter[str]()
    changed = Counter[str]()
    reader = reader.with_empty_counts()
    refuse_swapped_columns(source, rows)

    pairs: list[Pair] = []
    for row in shuffle_rows(rows, seed, source, limit):
        if limit is not None and len(pairs) == limit:
            break
        pair = _read_pair(row, form, reader, needs, dropped, changed)
        if pair is not None:
            pairs.append(pair)

    changed.update(reader.count_lossy(source))
    if not pairs:
        raise no_examples_error(source, len(rows), dropped)
    require_all_or_none(source, [pair.ref_logps for pair in pairs])
    return PairSet(tuple(pairs), dict(dropped), dict(changed))


def _read_pair(
    row: Row, form: str, reader: Reader, needs: frozenset[str], dropped: Counts, changed: Counts
) -> Pair | None:
    """The row's pair; None if the row is left out, which ``dropped`` then counts."""
    sides = sides_of(row, form, reader)
    reason = sides if isinstance(sides, str) else _strength_problem(row, needs)
    if reason is not None:
        dropped[reason] += 1
        return None
    assert isinstance(sides, Sides)
    tokens = tokens_of(row, sides, reader, changed)
    if isinstance(tokens, str):
        dropped[tokens] += 1
        return None

    strength = {"margin": margin_of(row), "p_chosen": numeric_value(row, "p_chosen")}
    pair = dataclasses.replace(
        tokens,
        **strength,
        columns=numeric_columns(row, needs),
        ref_logps=reference_logps(row, *PAIR_REFERENCE),
    )
    if preference_of(row) < 0:
        changed["swapped, as their strength says"] += 1
        return _swap_sides(pair)
    return pair


def _swap_sides(pair: Pair) -> Pair:
    """The pair with both sides exchanged, which does not change a loss with soft targets (the MMPO authors
    exchange below a probability of 0.5).
    """
    margin = None if pair.margin is None else -pair.margin
    p_chosen = None if pair.p_chosen is None else 1 - pair.p_chosen
    ref_logps = None if pair.ref_logps is None else pair.ref_logps[::-1]
    return dataclasses.replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        margin=margin,
        p_chosen=p_chosen,
        ref_logps=ref_logps,
    )


# contents ---------------------------------------------------------------------------------------------------


def sides_of(row: Row, form: str, reader: Reader) -> Sides | str:
    """The prompt and completions of the row, or the reason why the row is left out."""
    chosen = completion_of(row, "chosen")
    rejected = completion_of(row, "rejected")
    if form.endswith("transcripts"):
        assert isinstance(chosen, str) and isinstance(rejected, str)
        return _split_transcripts(chosen, rejected, reader)
    if form.endswith("begin with their prompt"):
        sides = _split_common_beginning(row, chosen, rejected, reader)
    else:
        sides = Sides(format_prompt(row, reader.data), chosen, rejected)
    if isinstance(sides, str):
        return sides
    return "empty" if is_empty(sides.chosen) or is_empty(sides.rejected) else sides


def _split_common_beginning(row: Row, chosen: Text, rejected: Text, reader: Reader) -> Sides | str:
    """Takes the longest common beginning as the prompt (a space at its end belongs to the completions)."""
    common = next(
        (
            position
            for position, (left, right) in enumerate(zip(chosen, rejected, strict=False))
            if left != right
        ),
        min(len(chosen), len(rejected)),
    )
    if chosen == rejected:
        return "identical"
    if isinstance(chosen, str):
        common -= chosen[:common].endswith(" ")
    prompt = chosen[:common]
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(
            f"{row.where}: no prompt: there is no such column, and chosen and rejected have no common "
            "beginning"
        )
    if not isinstance(prompt, str):
        prompt = checked_prompt_messages(
            row, "the common beginning of chosen and rejected", prompt, reader.data
        )
    return Sides(prompt, chosen[common:], rejected[common:])


def parse_transcript(text: str) -> list[dict[str, str]]:
    """``\\n\\nHuman: ...\\n\\nAssistant: ...`` as messages. Text before the first turn is ignored."""
    pieces = _TURN.split("\n\n" + text.lstrip())
    return [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _split_transcripts(chosen: str, rejected: str, reader: Reader) -> Sides | str:
    """Takes all turns except the last as the prompt and the last, the assistant's, as the completion.

    As text, the prompt ends with ``\\n\\nAssistant:``.
    """
    chosen_turns = parse_transcript(chosen)
    rejected_turns = parse_transcript(rejected)
    if (
        chosen_turns[-1]["role"] != "assistant"
        or rejected_turns[-1]["role"] != "assistant"
        or len(chosen_turns) < 2
    ):
        return "without an answer"
    if chosen_turns[:-1] != rejected_turns[:-1]:
        return "different prompts"
    if not chosen_turns[-1]["content"] or not rejected_turns[-1]["content"]:
        return "empty"

    if reader.has_template:
        return Sides(chosen_turns[:-1], chosen_turns[-1:], rejected_turns[-1:])
    ends = [text.rindex("\n\nAssistant:") + len("\n\nAssistant:") for text in (chosen, rejected)]
    return Sides(chosen[: ends[0]], chosen[ends[0] :].rstrip(), rejected[ends[1] :].rstrip())


def tokens_of(row: Row, sides: Sides, reader: Reader, changed: Counts) -> Pair | str:
    """The pair as token ids within the limits, or the reason why it is left out.

    Both sides share the same prompt, cut once.
    """
    try:
        inputs = reader.inputs_of(row)
        prompt_text, prompt = reader.encode_prompt(sides.prompt, inputs)
        chosen, rejected = (
            reader.encode_completion(sides.prompt, prompt_text, completion, inputs)
            for completion in (sides.chosen, sides.rejected)
        )
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error

    limit = reader.data.max_completion_tokens
    is_long = [len(completion) > limit for completion in (chosen, rejected)]
    kept = reader.cut_prompt(prompt)
    if not chosen or not rejected:
        return "empty"
    if reader.data.too_long == "drop" and (any(is_long) or kept != prompt):
        return "too long"
    if sum(is_long) == 1:
        return "too long on one side"
    if chosen[:limit] == rejected[:limit]:
        return "identical"

    changed.update({"prompts cut": int(kept != prompt), "completions cut": 2 * int(all(is_long))})
    return Pair(row.id, kept, chosen[:limit], rejected[:limit])


# strengths --------------------------------------------------------------------------------------------------


def margin_of(row: Row) -> float | None:
    """The column ``margin``, or else the difference of the scores; None if it is missing or not finite."""
    if "margin" in row.columns:
        return numeric_value(row, "margin")
    return next((difference for _, difference in _score_differences(row)), None)


def _score_differences(row: Row) -> Iterator[tuple[str, float | None]]:
    """(text, score of chosen minus that of rejected) for each pair of score columns that the row has."""
    for better, worse in _SCORES:
        if better in row.columns or worse in row.columns:
            if better not in row.columns or worse not in row.columns:
                raise ValueError(
                    f"{row.where}: a score needs both {better} and {worse}; there are {sorted(row.columns)}"
                )
            first = numeric_value(row, better)
            second = numeric_value(row, worse)
            difference = None if first is None or second is None else first - second
            yield f"{better} {first} and {worse} {second}", difference


def preference_of(row: Row) -> int:
    """1 if the row's strengths prefer chosen, -1 if they prefer rejected, 0 if there are none or the sides
    are equal.

    Raises ValueError if p_chosen is no probability, or if one column prefers chosen and another rejected.
    """
    margin = numeric_value(row, "margin")
    p_chosen = numeric_value(row, "p_chosen")
    if p_chosen is not None and not 0 <= p_chosen <= 1:
        raise ValueError(f"{row.where}: p_chosen is {p_chosen}; a probability is expected")
    strengths = [(f"margin {margin}", margin), *_score_differences(row)]
    strengths.append((f"p_chosen {p_chosen}", None if p_chosen is None else p_chosen - 0.5))

    for_chosen = [text for text, strength in strengths if strength is not None and strength > 0]
    for_rejected = [text for text, strength in strengths if strength is not None and strength < 0]
    if for_chosen and for_rejected:
        raise ValueError(
            f"{row.where}: {for_chosen[0]} prefer chosen, {for_rejected[0]} prefer rejected; correct the "
            "row, or leave out the column that means something else"
        )
    return bool(for_chosen) - bool(for_rejected)


def _strength_problem(row: Row, needs: frozenset[str]) -> str | None:
    """The reason why the row's strength excludes it, or None.

    A loss that needs a strength is never computed without it, because that would be another loss.
    """
    names = {name for pair in _SCORES for name in pair} | {"margin"}
    preference = preference_of(row)
    margin = margin_of(row)
    p_chosen = numeric_value(row, "p_chosen")
    if MARGIN in needs and margin is None:
        if not names & row.columns.keys():
            raise ValueError(
                f"{row.where}: the loss needs a margin: a column margin, or score_chosen and score_rejected; "
                f"there are {sorted(row.columns)}"
            )
        return "without a finite margin"
    if P_CHOSEN in needs and p_chosen is None:
        if "p_chosen" not in row.columns:
            raise ValueError(
                f"{row.where}: the loss needs p_chosen, the probability that chosen is better; there are "
                f"{sorted(row.columns)}"
            )
        return "without a finite p_chosen"
    if not needs & {"margin", "p_chosen"} and preference < 0:
        return CONTRADICTED
    return None


def refuse_swapped_columns(source: str, rows: Sequence[Row]) -> None:
    """Raises ValueError if the scores prefer the rejected side in most pairs: the columns are then probably
    exchanged.
    """
    margins_found = [margin for row in rows if (margin := margin_of(row)) is not None]
    against = sum(margin < 0 for margin in margins_found)
    if against > len(margins_found) / 2:
        raise ValueError(
            f"{source}: in {against} of {len(margins_found)} pairs the score of chosen is below that of "
            "rejected; are the columns swapped? data.columns: {chosen: rejected, rejected: chosen} exchanges "
            "them"
        )


def scale_margins(sets: Sequence[PairSet], by: Literal["nothing", "std", "max_abs"]) -> list[PairSet]:
    """The sets with their margins divided by the standard deviation or the largest absolute margin of the
    first set.

    All pairs must have margins.
    """
    if by == "nothing":
        return list(sets)
    first = torch.tensor([pair.margin for pair in sets[0].pairs], dtype=torch.float64)
    factor = float(margins(first, torch.zeros_like(first), divide_by=by).abs().max() / first.abs().max())
    return [
        dataclasses.replace(pair_set, pairs=tuple(_scale_margin(pair, factor) for pair in pair_set.pairs))
        for pair_set in sets
    ]


def _scale_margin(pair: Pair, factor: float) -> Pair:
    assert pair.margin is not None
    return dataclasses.replace(pair, margin=pair.margin * factor)
