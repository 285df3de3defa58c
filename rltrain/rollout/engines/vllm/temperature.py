"""HAPO's adaptive temperature (``rollout/temperature.py``) as a logits processor of vLLM's V1 model runner.

vLLM reports log-probs of the distribution it drew from, here softmax(logits / T) with a different T for every
token; a learner computes softmax(logits / T0). With l = logits / T0 and the factor f = T / T0 the two differ
by numbers known when the token is drawn: log p0 = f (log p + logsumexp(l / f)) - logsumexp(l). The processor
records f and the constant for each token that it tempers, and ``Corrections`` turns the reported log-probs
into those at T0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rltrain.rollout.engines.vllm.row_processor import RequestId, RowProcessor
from rltrain.rollout.temperature import entropy_of, token_temperatures
from rltrain.types.samples import AdaptiveTemperature, Sampling

__all__ = ["AdaptiveTemperatureProcessor", "Corrections", "extra_args", "take_corrections"]

_KEY = "rltrain_adaptive_temperature"
# (t,) int32 positions, ascending, and (2, t) float32 f and constant
_Records = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def extra_args(index: int, sampling: Sampling) -> dict[str, Any] | None:
    """The ``SamplingParams.extra_args`` of a request, which the processor reads; None where the temperature
    is not adapted.
    """
    return None if sampling.adaptive is None else {_KEY: {"index": index, **asdict(sampling.adaptive)}}


@dataclass(frozen=True)
class _Row:
    """A completion in progress, in vLLM's batch."""

    number: int  # of the request, in order of arrival
    temperature: float
    adaptive: AdaptiveTemperature
    tokens: Sequence[int]  # vLLM's own growing list


class AdaptiveTemperatureProcessor(RowProcessor[_Row]):
    """Divides the logits of tempered rows, already at T0, by f.

    Greedy rows and rows without ``extra_args`` stay as they are.
    """

    key = _KEY

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        # per forward: (2, R) request numbers and positions, (2, R) f and constant
        self._records: list[tuple[np.ndarray[Any, Any], Tensor]] = []

    def make_row(self, settings: Mapping[str, Any], params: Any, tokens: Sequence[int]) -> _Row:
        fields = dict(settings)
        number = self.number_request(fields.pop("index"), params.seed)
        return _Row(number, params.temperature, AdaptiveTemperature(**fields), tokens)

    def apply(self, logits: Tensor) -> Tensor:
        places: dict[tuple[float, AdaptiveTemperature], list[int]] = {}
        for place, row in self.rows.items():
            places.setdefault((row.temperature, row.adaptive), []).append(place)
        for (temperature, adaptive), row_places in places.items():
            indexes = torch.tensor(row_places, device=logits.device)
            base = torch.log_softmax(logits[indexes], dim=-1)  # l less its logsumexp, which is then 0
            factor = token_temperatures(entropy_of(base), temperature, adaptive) / temperature
            tempered = base / factor[:, None]
            logits[indexes] = tempered
            rows = [self.rows[place] for place in row_places]
            numbers = [row.number for row in rows]
            positions = [len(row.tokens) for row in rows]
            constant = factor * torch.logsumexp(tempered, dim=-1)
            self._records.append(
                (np.array([numbers, positions], dtype=np.int32), torch.stack([factor, constant]))
            )
        return logits

    def take(self) -> dict[RequestId, _Records]:
        """The records of each request since the last call, which are then deleted."""
        if not self._records:
            return {}
        numbers, positions = np.concatenate([labels for labels, _ in self._records], axis=1)
        values = torch.cat([values for _, values in self._records], dim=1).cpu().numpy()
        # stable: where a token was computed twice, the later draw comes last
        order = np.lexsort((positions, numbers))
        numbers, positions, values = numbers[order], positions[order], values[:, order]
        last = np.append((numbers[1:] != numbers[:-1]) | (positions[1:] != positions[:-1]), True)
        numbers, positions, values = numbers[last], positions[last], values[:, last]
        ends = np.searchsorted(numbers, np.arange(len(self.numbers) + 1))
        records = {
            request: (positions[ends[n] : ends[n + 1]], values[:, ends[n] : ends[n + 1]])
            for request, n in self.numbers.items()
        }
        self._records.clear()
        self.numbers.clear()
        return records


def take_corrections(worker: Any) -> dict[RequestId, _Records]:
    """Takes the records of the processor in vLLM's worker, in which this runs."""
    [processor] = [
        processor
        for processor in worker.model_runner.input_batch.logitsprocs.all
        if isinstance(processor, AdaptiveTemperatureProcessor)
    ]
    return processor.take()


@dataclass(frozen=True)
class Corrections:
    """Turns reported log-probs into log-probs at T0."""

    records: Mapping[RequestId, _Records]

    def correct(self, index: int, seed: int, logprobs: Sequence[float]) -> tuple[float, ...]:
        """(t,) the log-probs at T0 of completion ``seed`` of prompt ``index``.

        Raises RuntimeError where a token was not tempered.
        """
        no_records = np.empty(0, np.int32), np.empty((2, 0), np.float32)
        positions, (factor, constant) = self.records.get((index, seed), no_records)
        if not np.array_equal(positions[: len(logprobs)], np.arange(len(logprobs))):
            raise RuntimeError(
                f"of a completion's {len(logprobs)} tokens vLLM drew some past the processor that adapts "
                "their temperature; this vLLM version is not supported, drop rollout.adaptive_temperature"
            )
        factor = factor[: len(logprobs)].astype(np.float64)
        corrected = np.asarray(logprobs) * factor + constant[: len(logprobs)]
        return tuple(corrected.tolist())
