"""Judged examples as optimizer batches: token ids, log-probs of frozen models, and the order of examples."""

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
from rltrain.learner.degree_head import DegradedRows
from rltrain.learner.preference_learner import lengths_of, pair_rows
from rltrain.loss.preference.kto import mismatched_partner
from rltrain.seeds import stable_hash
from rltrain.types.policy import TokenRows
from rltrain.types.preference import CompletionFacts, LabelBatch, PairBatch

__all__ = [
    "DegradedTexts",
    "ExampleOrder",
    "Examples",
    "Mismatches",
    "examples_of_labels",
    "examples_of_pairs",
    "select_rows",
]


@dataclass(frozen=True)
class Mismatches:
    """KTO's mismatched rows for every step of a run: prompt i with another prompt's completion."""

    seed: int
    ref_logp: Tensor  # (steps x per_step,) nats, step after step

    def rows(self, rows: TokenRows, prompt: Tensor, step: int) -> TokenRows:
        return mismatched_rows(rows, prompt, self.seed, step)

    def facts(self, mismatched: TokenRows, step: int) -> CompletionFacts:
        count = len(mismatched)
        ref_logp = self.ref_logp[(step - 1) * count : step * count]
        return CompletionFacts(lengths_of(mismatched), ref_logp=ref_logp)


@dataclass(frozen=True)
class DegradedTexts:
    """The versions of each pair's chosen completion, of which a step takes one (SPO)."""

    versions: Sequence[tuple[tuple[int, tuple[int, ...]], ...]]  # (degree, token ids), the intact one first
    seed: int

    def draw(self, chosen: Sequence[int], step: int) -> DegradedRows:
        """A version of each of the examples ``chosen``, each degree that it has as likely as another."""
        drawn = [
            self.versions[example][stable_hash(self.seed, "degree", step, example) % len(versions)]
            for example in chosen
            for versions in (self.versions[example],)
        ]
        degree = torch.tensor([degree for degree, _ in drawn], dtype=torch.int64)
        return DegradedRows(tuple(token_ids for _, token_ids in drawn), degree)


@dataclass(frozen=True)
class Examples:
    """All training or held-out examples; ``rows`` and ``full_batch`` are in the same order."""

    rows: TokenRows  # of pairs: the chosen completions, then the rejected
    full_batch: PairBatch | LabelBatch
    mismatches: Mismatches | None = None
    degraded: DegradedTexts | None = None

    def __len__(self) -> int:
        return len(self.full_batch)

    @property
    def sides(self) -> int:
        """Rows per example."""
        return 2 if isinstance(self.full_batch, PairBatch) else 1

    def batch(
        self, chosen: Sequence[int], step: int
    ) -> tuple[TokenRows, PairBatch | LabelBatch, TokenRows | None]:
        """(rows, batch, mismatched rows) of the examples ``chosen``, which ``step`` takes."""
        rows = select_rows(self.rows, chosen, self.sides)
        batch = self.full_batch.rows(chosen)
        if self.mismatches is None or isinstance(batch, PairBatch):
            return rows, batch, None
        others = self.mismatches.rows(rows, batch.prompt, step)
        return rows, dataclasses.replace(batch, mismatched=self.mismatches.facts(others, step)), others


class ExampleOrder:
    """Which examples each step takes: a random permutation of ``units`` per epoch, whose examples stay
    together.
    """

    def __init__(self, units: Sequence[Sequence[int]], per_step: int, seed: int) -> None:
        size = len(units[0])
        if any(len(unit) != size for unit in units) or per_step % size:
            sizes = sorted({len(unit) for unit in units})
            raise UserError(
                "the loss needs all completions of a prompt in one step, but prompts have "
                f"{', '.join(map(str, sizes))} of them and train.examples is {per_step}; give every prompt "
                "equally many and make train.examples a multiple of that"
            )
        if len(units) * size < per_step:
            raise UserError(
                f"a step takes {per_step} different examples and the training set has {len(units) * size}; "
                "lower train.examples, or give more data (rows may have been left out: see above)"
            )
        self.units = units
        self.per_step = per_step
        self._order = PromptOrder(len(units), per_step // size, seed)

    def next(self) -> list[int]:
        """The ``per_step`` examples of the next step, all different."""
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
    rows = rows_of_pairs(pairs)
    count = len(pairs)
    lengths = lengths_of(rows)
    chosen = CompletionFacts(lengths[:count], **{name: value[:count] for name, value in logps.items()})
    rejected = CompletionFacts(lengths[count:], **{name: value[count:] for name, value in logps.items()})
    batch = PairBatch(
        chosen,
        rejected,
        prompt_ids([pair.prompt for pair in pairs]),
        margin=_to_tensor([pair.margin for pair in pairs]),
        p_chosen=_to_tensor([pair.p_chosen for pair in pairs]),
        columns=_columns([pair.columns for pair in pairs]),
    )
    return Examples(rows, batch)


def examples_of_labels(
    completions: Sequence[LabelledCompletion],
    logps: Mapping[str, Tensor],
    mismatches: Mismatches | None = None,
) -> Examples:
    """logps: (N,) by field of CompletionFacts."""
    rows = rows_of_labels(completions)
    batch = LabelBatch(
        CompletionFacts(lengths_of(rows), **logps),
        prompt_ids([row.prompt for row in completions]),
        label=_to_tensor([row.label for row in completions]),
        columns=_columns([row.columns for row in completions]),
    )
    return Examples(rows, batch, mismatches)


def data_ref_logps(examples: Sequence[Pair] | Sequence[LabelledCompletion]) -> Tensor | None:
    """(R,) nats, the reference's log-probs that the data contain, in the order of the rows; None unless every
    example has them.
    """
    logps = [
        (example.ref_logp,) if isinstance(example, LabelledCompletion) else example.ref_logps or (None, None)
        for example in examples
    ]
    return _to_tensor([value for side in zip(*logps, strict=True) for value in side])


def rows_of_pairs(pairs: Sequence[Pair]) -> TokenRows:
    return pair_rows(
        [pair.prompt for pair in pairs], [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    )


def rows_of_labels(completions: Sequence[LabelledCompletion]) -> TokenRows:
    prompts = tuple(row.prompt for row in completions)
    texts = tuple(row.completion for row in completions)
    if all(row.scored is None for row in completions):
        return TokenRows(prompts, texts)
    return TokenRows(
        prompts, texts, tuple(row.scored or (True,) * len(row.completion) for row in completions)
    )


def select_rows(rows: TokenRows, chosen: Sequence[int], sides: int) -> TokenRows:
    """The rows of the examples ``chosen``: all first sides, then all second sides, as in ``rows``."""
    count = len(rows) // sides
    indices = [side * count + index for side in range(sides) for index in chosen]
    return rows.rows(torch.tensor(indices, dtype=torch.int64))


def mismatched_rows(rows: TokenRows, prompt: Tensor, seed: int, step: int) -> TokenRows:
    """Row i is prompt i with another prompt's completion. prompt: (N,) ids.

    Raises UserError where no such pairing exists.
    """
    try:
        partner = mismatched_partner(prompt, stable_hash(seed, "mismatched", step))
    except ValueError as error:
        raise UserError(f"{error} (train.examples is {len(rows)})") from error
    others = rows.rows(partner)
    return TokenRows(rows.prompts, others.completions, others.scored)


def prompt_ids(prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """(N,) int64, equal for equal prompts, from 0 in order of first appearance."""
    ids: dict[tuple[int, ...], int] = {}
    return torch.tensor([ids.setdefault(prompt, len(ids)) for prompt in prompts])


def group_by_prompt(prompt: Tensor) -> list[list[int]]:
    """The examples of each prompt, by position. prompt: (N,) ids."""
    groups: dict[int, list[int]] = {}
    for example, prompt_id in enumerate(prompt.tolist()):
        groups.setdefault(prompt_id, []).append(example)
    return list(groups.values())


def _to_tensor(values: Sequence[float | None]) -> Tensor | None:
    """None where a value is missing: then the loss does not need them."""
    return None if any(value is None for value in values) else torch.tensor(values, dtype=torch.float32)


def _columns(columns: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in columns], dtype=torch.float32) for name in columns[0]}
