"""Judged examples as optimizer batches: token ids, what frozen models say of them, and which come next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.data.labels import LabelledCompletion
from rltrain.data.order import PromptOrder
from rltrain.data.preferences import Pair
from rltrain.errors import UserError
from rltrain.learner.preference_learner import lengths_of, pair_rows
from rltrain.loss.preference.kto import mismatched_partner
from rltrain.seeds import stable_hash
from rltrain.types.policy import TokenRows
from rltrain.types.preference import CompletionFacts, LabelBatch, PairBatch

__all__ = ["ExampleOrder", "Examples", "Mismatches", "examples_of_labels", "examples_of_pairs", "rows_of"]


@dataclass(frozen=True)
class Mismatches:
    """KTO's other rows for every step of a run: prompt i with another prompt's completion."""

    seed: int
    ref_logp: Tensor  # (steps x per_step,) nats, step after step

    def rows(self, rows: TokenRows, prompt: Tensor, step: int) -> TokenRows:
        return mismatched_rows(rows, prompt, self.seed, step)

    def facts(self, mismatched: TokenRows, step: int) -> CompletionFacts:
        count = len(mismatched)
        return CompletionFacts(
            lengths_of(mismatched), ref_logp=self.ref_logp[(step - 1) * count : step * count]
        )


@dataclass(frozen=True)
class Examples:
    """All training or held-out examples; ``rows`` and ``whole`` in the same order."""

    rows: TokenRows  # of pairs: the chosen completions, then the rejected
    whole: PairBatch | LabelBatch
    mismatches: Mismatches | None = None

    def __len__(self) -> int:
        return len(self.whole)

    @property
    def sides(self) -> int:
        """Rows per example."""
        return 2 if isinstance(self.whole, PairBatch) else 1

    def batch(
        self, chosen: Sequence[int], step: int
    ) -> tuple[TokenRows, PairBatch | LabelBatch, TokenRows | None]:
        """(rows, batch, mismatched rows) of the examples ``chosen``, which are those of ``step``."""
        rows, batch = rows_of(self.rows, chosen, self.sides), self.whole.rows(chosen)
        if self.mismatches is None or isinstance(batch, PairBatch):
            return rows, batch, None
        others = self.mismatches.rows(rows, batch.prompt, step)
        return rows, dataclasses.replace(batch, mismatched=self.mismatches.facts(others, step)), others


class ExampleOrder:
    """Which examples each step takes: random permutations, one per epoch, of ``units`` that stay together."""

    def __init__(self, units: Sequence[Sequence[int]], per_step: int, seed: int) -> None:
        size = len(units[0])
        if any(len(unit) != size for unit in units) or per_step % size:
            sizes = sorted({len(unit) for unit in units})
            raise UserError(
                "the loss needs all completions of a prompt in one step, but prompts have "
                f"{', '.join(map(str, sizes))} of them and "
                f"train.examples is {per_step}; give every prompt equally many and make train.examples a "
                "multiple of that"
            )
        if len(units) * size < per_step:
            raise UserError(
                f"a step takes {per_step} different examples and the training set has {len(units) * size}; "
                "lower train.examples, or give "
                "more data (rows may have been left out: see above)"
            )
        self.units, self.per_step = units, per_step
        self._order = PromptOrder(len(units), per_step // size, seed)

    def next(self) -> list[int]:
        """``per_step`` different examples."""
        return [example for unit in self._order.next() for example in self.units[unit]]

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self._order.epoch + self._order.cursor / self._order.count

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._order.load_state_dict(state)


# from data to rows ------------------------------------------------------------------------------------------


def examples_of_pairs(pairs: Sequence[Pair], logps: Mapping[str, Tensor]) -> Examples:
    """logps: (2N,) by field of CompletionFacts, of the rows of ``pair_rows``."""
    rows, count = rows_of_pairs(pairs), len(pairs)
    lengths = lengths_of(rows)
    chosen = CompletionFacts(lengths[:count], **{name: value[:count] for name, value in logps.items()})
    rejected = CompletionFacts(lengths[count:], **{name: value[count:] for name, value in logps.items()})
    whole = PairBatch(
        chosen,
        rejected,
        prompt_ids([pair.prompt for pair in pairs]),
        margin=_numbers([pair.margin for pair in pairs]),
        p_chosen=_numbers([pair.p_chosen for pair in pairs]),
        columns=_columns([pair.columns for pair in pairs]),
    )
    return Examples(rows, whole)


def examples_of_labels(
    completions: Sequence[LabelledCompletion], logps: Mapping[str, Tensor], mismatches: Mismatches | None = None
) -> Examples:
    """logps: (N,) by field of CompletionFacts."""
    rows = rows_of_labels(completions)
    whole = LabelBatch(
        CompletionFacts(lengths_of(rows), **logps),
        prompt_ids([one.prompt for one in completions]),
        label=_numbers([one.label for one in completions]),
        columns=_columns([one.columns for one in completions]),
    )
    return Examples(rows, whole, mismatches)


def given_logps(examples: Sequence[Pair] | Sequence[LabelledCompletion]) -> Tensor | None:
    """(R,) nats, the reference's log-probs that the data bring, of the rows in their arrangement;
    None where they bring none.
    """
    ones = [
        (one.ref_logp,) if isinstance(one, LabelledCompletion) else one.ref_logps or (None, None) for one in examples
    ]
    return _numbers([value for side in zip(*ones, strict=True) for value in side])


def rows_of_pairs(pairs: Sequence[Pair]) -> TokenRows:
    return pair_rows(
        [pair.prompt for pair in pairs], [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    )


def rows_of_labels(completions: Sequence[LabelledCompletion]) -> TokenRows:
    return TokenRows(tuple(one.prompt for one in completions), tuple(one.completion for one in completions))


def rows_of(rows: TokenRows, chosen: Sequence[int], sides: int) -> TokenRows:
    """The rows of some examples, in the same arrangement."""
    count = len(rows) // sides
    picked = [side * count + at for side in range(sides) for at in chosen]
    return TokenRows(tuple(rows.prompts[at] for at in picked), tuple(rows.completions[at] for at in picked))


def mismatched_rows(rows: TokenRows, prompt: Tensor, seed: int, step: int) -> TokenRows:
    """Row i is prompt i with another prompt's completion. prompt: (N,) ids.

    Raises UserError where no such pairing exists.
    """
    try:
        partner = mismatched_partner(prompt, stable_hash(seed, "mismatched", step)).tolist()
    except ValueError as error:
        raise UserError(f"{error} (train.examples is {len(rows)})") from error
    return TokenRows(rows.prompts, tuple(rows.completions[at] for at in partner))


def prompt_ids(prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """(N,) int64, equal for equal prompts, by first appearance."""
    seen: dict[tuple[int, ...], int] = {}
    return torch.tensor([seen.setdefault(prompt, len(seen)) for prompt in prompts])


def groups_of(prompt: Tensor) -> list[list[int]]:
    """The examples of each prompt."""
    found: dict[int, list[int]] = {}
    for at, number in enumerate(prompt.tolist()):
        found.setdefault(number, []).append(at)
    return list(found.values())


def _numbers(values: Sequence[float | None]) -> Tensor | None:
    """None where one is missing: then the loss does not need them."""
    return None if any(value is None for value in values) else torch.tensor(values, dtype=torch.float32)


def _columns(columns: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([one[name] for one in columns], dtype=torch.float32) for name in columns[0]}
