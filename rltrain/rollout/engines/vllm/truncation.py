"""Truncated sampling (``rollout/truncation.py``) as a logits processor of vLLM's V1 model runner.

vLLM's own top-p, top-k and min-p keep the set of tokens to themselves. This processor drops the same tokens
as the embedded engine and records the others for those who ask, so that a learner can renormalise over them.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.rollout.engines.vllm.row_processor import RequestId, RowProcessor
from rltrain.rollout.truncation import kept_tokens
from rltrain.types.samples import Sampling, TokenSets, Truncation

__all__ = ["KeptSets", "TruncationProcessor", "extra_args", "take_kept"]

_KEY = "rltrain_truncation"
_Set = tuple[array, float]  # the tokens that stayed, and their probability before the others were dropped


def extra_args(index: int, sampling: Sampling) -> dict[str, Any] | None:
    """The ``SamplingParams.extra_args`` of a request, which the processor reads; None where any token may be
    drawn.
    """
    if sampling.truncation.is_whole or sampling.temperature == 0:
        return None
    settings = {"index": index, "returns_kept": sampling.returns_kept, **asdict(sampling.truncation)}
    return {_KEY: settings}


@dataclass(frozen=True)
class _Row:
    """A completion in progress, in vLLM's batch."""

    number: int | None  # of the request, in order of arrival; None: nothing is recorded
    truncation: Truncation
    tokens: Sequence[int]  # vLLM's own growing list


class TruncationProcessor(RowProcessor[_Row]):
    """Sets the logits of dropped tokens to -inf. Greedy rows and rows without ``extra_args`` stay as they
    are.
    """

    key = _KEY

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._records: dict[int, dict[int, _Set]] = {}  # by request number and position; the last draw counts

    def make_row(self, settings: Mapping[str, Any], params: Any, tokens: Sequence[int]) -> _Row:
        fields = dict(settings)
        index = fields.pop("index")
        number = self.number_request(index, params.seed) if fields.pop("returns_kept") else None
        return _Row(number, Truncation(**fields), tokens)

    def apply(self, logits: Tensor) -> Tensor:
        places: dict[Truncation, list[int]] = {}
        for place, row in self.rows.items():
            places.setdefault(row.truncation, []).append(place)
        for truncation, row_places in places.items():
            indexes = torch.tensor(row_places, device=logits.device)
            values = logits[indexes]
            is_kept = kept_tokens(values, truncation)
            self._record([self.rows[place] for place in row_places], values, is_kept)
            logits[indexes] = values.masked_fill(~is_kept, -torch.inf)
        return logits

    def _record(self, rows: Sequence[_Row], values: Tensor, is_kept: Tensor) -> None:
        if all(row.number is None for row in rows):
            return
        mass = torch.where(is_kept, values.softmax(dim=-1), 0.0).sum(dim=-1).tolist()
        sets = torch.nonzero(is_kept)[:, 1].split(is_kept.sum(dim=-1).tolist())
        for row, ids, row_mass in zip(rows, sets, mass, strict=True):
            if row.number is not None:
                positions = self._records.setdefault(row.number, {})
                positions[len(row.tokens)] = array("i", ids.tolist()), row_mass

    def take(self) -> dict[RequestId, dict[int, _Set]]:
        """The records of each request since the last call, which are then deleted."""
        records = {request: self._records.get(number, {}) for request, number in self.numbers.items()}
        self._records = {}
        self.numbers.clear()
        return records


def take_kept(worker: Any) -> dict[RequestId, dict[int, _Set]]:
    """Takes the records of the processor in vLLM's worker, in which this runs."""
    [processor] = [
        processor
        for processor in worker.model_runner.input_batch.logitsprocs.all
        if isinstance(processor, TruncationProcessor)
    ]
    return processor.take()


@dataclass(frozen=True)
class KeptSets:
    """The sets of tokens that completions were drawn from."""

    records: Mapping[RequestId, Mapping[int, _Set]]

    def take_sets(self, index: int, seed: int, count: int) -> TokenSets:
        """Those of the ``count`` tokens of completion ``seed`` of prompt ``index``.

        Raises RuntimeError where vLLM drew a token past the processor.
        """
        positions = self.records.get((index, seed), {})
        sets = TokenSets.empty()
        for position in range(count):
            if position not in positions:
                raise RuntimeError(
                    f"vLLM drew token {position} of a completion's {count} past the processor that truncates "
                    "its distribution; this vLLM version is not supported, sample from all tokens"
                )
            sets.append(*positions[position])
        return sets
