"""Per-token numbers for transcripts: what a step knew of each token that it trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.types.policy import TrainBatch
from rltrain.types.samples import Completion, ScoredGroup

COMPLETIONS = 4  # completions of a prompt that get numbers
TOKENS = 256  # tokens of a completion that get numbers, from its start
STEPS = 50  # steps of a run, evenly spaced, that get numbers
_WINDOW = 8  # tokens that may spell one character together


@dataclass(frozen=True)
class TokenTensors:
    """A step's tensors, as its update read them.

    logp, entropy: (B, T) nats, the learner's, of the policy that sampled. clipped: (B, T) number of the
    step's updates in which the policy loss clipped the token; None: unknown. touched: (B, T) the same for
    controls that changed it; None: the recipe has none.
    """

    batch: TrainBatch
    logp: Tensor
    entropy: Tensor
    clipped: Tensor | None = None
    touched: Tensor | None = None


@dataclass(frozen=True)
class TokenNumbers:
    """Chooses the tokens that get numbers, so that a run's transcripts stay small.

    decode: ids to text without special tokens. every: steps between those with numbers.
    """

    decode: Callable[[Sequence[int]], str]
    every: int

    def is_due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    def records(self, group: ScoredGroup, tensors: TokenTensors) -> list[dict[str, Any] | None]:
        """The texts and numbers of the tokens of each completion of ``group``.

        None where it has none, as for a row that the step did not train on.
        """
        rows = rows_of_group(tensors.batch, group.group)
        return [
            self._record(completion, rows[sample], tensors)
            if sample in rows and sample < COMPLETIONS
            else None
            for sample, completion in enumerate(group.completions)
        ]

    def _record(self, completion: Completion, row: int, tensors: TokenTensors) -> dict[str, Any]:
        token_ids = completion.token_ids[:TOKENS]
        values = numbers_of_row(row, len(token_ids), tensors)
        versions = [span.version for span in completion.versions for _ in range(span.start, span.stop)]
        return {
            "text": split_text(token_ids, self.decode),
            **{name: _round(value) for name, value in values.items()},
            **({"version": versions[: len(token_ids)]} if len(set(versions)) > 1 else {}),
        }


def rows_of_group(batch: TrainBatch, group: int) -> dict[int, int]:
    """The batch's row of each sample of the group that it holds."""
    if batch.sample is None:
        return {}
    rows = torch.nonzero(batch.group == group).flatten().tolist()
    return {int(batch.sample[row]): row for row in rows}


def numbers_of_row(row: int, count: int, tensors: TokenTensors) -> dict[str, Tensor]:
    """(count,) each. weight: 0 where a control or the reward left the token out; engine, reference: the
    learner's log-prob less theirs, nats. clip, touched: updates in which the loss clipped the token or a
    control had changed it; left out where there was none in the step.
    """
    batch = tensors.batch
    logp = tensors.logp
    values = {
        "entropy": tensors.entropy,
        "advantage": batch.advantages,
        "weight": batch.weights * batch.mask,
    }
    for name, other in (("engine", batch.rollout_logp), ("reference", batch.ref_logp)):
        if other is not None:
            values[name] = logp - other
    for name, counts in (("clip", tensors.clipped), ("touched", tensors.touched)):
        if counts is not None and bool(counts.any()):
            values[name] = counts
    return {name: value[row, :count] for name, value in values.items()}


def split_text(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each token. A character that several tokens spell belongs to the last of them."""
    pieces: list[str] = []
    start = done = 0  # the tokens before ``done`` have their text; decoding starts at ``start`` for context
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[start:end])
        if text.endswith("\ufffd") and end - done < _WINDOW:
            pieces.append("")
            continue
        pieces.append(text[len(decode(token_ids[start:done])) :])
        start, done = done, end
    return pieces


def _round(values: Tensor) -> list[float | None]:
    """Three significant digits; None for what JSON cannot express."""
    return [
        float(f"{value:.3g}") if finite else None
        for value, finite in zip(values.tolist(), torch.isfinite(values).tolist(), strict=True)
    ]
