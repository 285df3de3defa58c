"""Single completions that somebody called desirable or not: TRL's columns ``prompt``, ``completion``,
``label``.

A data set of preference pairs is read too, as two completions per pair: the chosen one desirable, the
rejected one not. A loss that asks for no label gets the chosen ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rltrain.config.schema import JudgedData
from rltrain.data.judged import (
    Counts,
    Reader,
    Side,
    all_or_none,
    checked_prompt,
    given_logps,
    is_empty,
    judged_rows,
    nothing_left,
    numeric_columns,
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

__all__ = ["LabelSet", "Labelled", "load_labels", "paired"]


_REFERENCE = (("reference_logps",), ("ref_logps",))  # TRL's names


@dataclass(frozen=True, slots=True)
class Labelled:
    """One completion as token ids, not empty."""

    id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    label: float | None = (
        None  # 1 desirable, 0 not, or between; None where the loss asks for none and the data has none
    )
    columns: Mapping[str, float] = field(default_factory=dict)  # further numbers that a loss asks for
    ref_logp: float | None = None  # nats, under a reference model, as the data have it


@dataclass(frozen=True)
class LabelSet:
    """Completions; how many rows were left out and why; what was done to those that stay."""

    completions: tuple[Labelled, ...]
    dropped: Mapping[str, int]
    changed: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def classes(self) -> tuple[int, int]:
        """(desirable, undesirable) completions; a soft label counts where it is nearer."""
        desirable = sum(one.label is not None and one.label > 0.5 for one in self.completions)
        return desirable, sum(one.label is not None for one in self.completions) - desirable


def load_labels(
    data: JudgedData,
    side: Side,
    reader: Reader,
    *,
    seed: int,
    limit: int | None = None,
    needs: frozenset[str],
) -> LabelSet:
    """The training or the held-out completions of ``data``; with ``limit``, the first so many that stay after
    a seeded shuffle.

    needs: what the loss takes from the data: "label", "column:<name>". Raises ValueError, naming file and
    line, when a row cannot be read or lacks what is needed, when formats are mixed, when no row is left, and
    when all labels needed are alike.
    """
    source, rows = judged_rows(data, side)
    form, pairs = require_one_form(rows), "chosen" in rows[0].columns
    dropped, changed, reader = Counter[str](), Counter[str](), reader.afresh()
    if pairs:
        refuse_swapped_columns(source, rows)
    found: list[Labelled] = []
    for row in shuffle_rows(rows, seed, source, limit):
        if limit is not None and len(found) >= limit:
            break
        found += (
            _both(row, form, reader, needs, dropped, changed)
            if pairs
            else _one(row, reader, needs, dropped, changed)
        )
    changed.update(reader.lossy(source))
    if not found:
        raise nothing_left(source, len(rows), dropped)
    all_or_none(source, [one.ref_logp for one in found])
    kept = LabelSet(tuple(found[:limit]), dict(dropped), dict(changed))
    if "label" in needs and side == "train" and 0 in kept.classes:
        desirable, undesirable = kept.classes
        raise ValueError(
            f"{source}: {desirable} desirable and {undesirable} undesirable completions: the loss learns "
            "from the contrast of both; "
            "add the other kind, or map the right column with data.columns, e.g. {label: correct}"
        )
    return kept


def _one(
    row: Row, reader: Reader, needs: frozenset[str], dropped: Counts, changed: Counts
) -> Sequence[Labelled]:
    """One completion, or none."""
    prompt, completion, label = (
        checked_prompt(row, reader.data),
        row.columns["completion"],
        label_of(row, needs),
    )
    reason = "empty" if is_empty(completion) else None
    if reason is None:
        try:
            spelt, token_ids = reader.prompt(prompt)
            answer = reader.completion(prompt, spelt, completion)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        most, kept = reader.data.max_completion_tokens, reader.cut_prompt(token_ids)
        cut = len(answer) > most, kept != token_ids
        reason = (
            "empty" if not answer else "too long" if any(cut) and reader.data.too_long == "drop" else None
        )
        if reason is None:
            changed.update({"prompts cut": int(cut[1]), "completions cut": int(cut[0])})
            given = given_logps(row, *_REFERENCE)
            return (
                Labelled(
                    row.id,
                    kept,
                    answer[:most],
                    label,
                    numeric_columns(row, needs),
                    None if given is None else given[0],
                ),
            )
    dropped[reason] += 1
    return ()


def _both(
    row: Row, form: str, reader: Reader, needs: frozenset[str], dropped: Counts, changed: Counts
) -> Sequence[Labelled]:
    """Both completions of a pair, or none; for a loss that asks for no label, and so raises whatever
    it is given, the chosen one.
    """
    sides = CONTRADICTED if preference_of(row) < 0 else sides_of(row, form, reader)
    pair = tokens_of(row, sides, reader, changed) if isinstance(sides, Sides) else sides
    if isinstance(pair, str):
        dropped[pair] += 1
        return ()
    columns, (ref_chosen, ref_rejected) = (
        numeric_columns(row, needs),
        given_logps(row, *PAIR_REFERENCE) or (None, None),
    )
    chosen = Labelled(f"{row.id}:chosen", pair.prompt, pair.chosen, 1.0, columns, ref_chosen)
    if "label" not in needs:
        return (chosen,)
    return chosen, Labelled(f"{row.id}:rejected", pair.prompt, pair.rejected, 0.0, columns, ref_rejected)


def label_of(row: Row, needs: frozenset[str]) -> float | None:
    """The label as a number from 0 to 1.

    Raises ValueError where it is neither that nor true or false, or is needed and missing.
    """
    label = row.columns.get("label")
    if label is None:
        if "label" in needs:
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


def paired(labels: LabelSet) -> bool:
    """Whether completions 2i and 2i + 1 are the chosen and the rejected one of a pair."""
    names = [one.id.rpartition(":") for one in labels.completions]
    return len(names) % 2 == 0 and all(
        (one[2], two[2]) == ("chosen", "rejected") and one[0] == two[0]
        for one, two in zip(names[::2], names[1::2], strict=True)
    )
