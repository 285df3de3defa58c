"""HAPO's adaptive temperature (``rollout/temperature.py``) as a logits processor of vLLM's V1 model runner.

vLLM reports log-probs of what it drew from, which is here softmax(logits / T) with a T of its own for every
token; a learner computes softmax(logits / T0). With l = logits / T0 and the factor f = T / T0 the two differ
by numbers known when the token is drawn: log p0 = f (log p + logsumexp(l / f)) - logsumexp(l). The processor
notes f and the constant for each token that it tempers, and ``Corrections`` turns the reported log-probs into
those at T0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from rltrain.rollout.temperature import entropy_of, token_temperatures
from rltrain.types.samples import AdaptiveTemperature, Sampling

__all__ = ["AdaptiveTemperatureProcessor", "Corrections", "extra_args", "take_corrections"]

_KEY = "rltrain_adaptive_temperature"
_Request = tuple[int, int]  # number of the prompt in its call of generate, and the completion's own seed
_Noted = tuple[
    np.ndarray[Any, Any], np.ndarray[Any, Any]
]  # (t,) int32 positions, ascending, and (2, t) float32 f and constant


def extra_args(index: int, sampling: Sampling) -> dict[str, Any] | None:
    """What a request's ``SamplingParams.extra_args`` say to the processor; None where no temperature
    adapts.
    """
    return None if sampling.adaptive is None else {_KEY: {"index": index, **asdict(sampling.adaptive)}}


@dataclass(frozen=True)
class _Row:
    """One completion being written, as it stands in vLLM's batch."""

    number: int  # of the request, in the order they came
    temperature: float
    adaptive: AdaptiveTemperature
    written: Sequence[int]  # vLLM's own growing list of tokens


class AdaptiveTemperatureProcessor(LogitsProcessor):
    """Divides the logits of tempered rows, already at T0, by f.

    Greedy rows and rows without ``extra_args`` stay as they are.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._numbers: dict[_Request, int] = {}
        self._noted: list[
            tuple[np.ndarray[Any, Any], Tensor]
        ] = []  # per forward (2, R) numbers and positions, (2, R) f and constant

    def is_argmax_invariant(self) -> bool:
        """True also says: after the temperature, and just before the token is drawn."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._rows.pop(index, None)
            asked: dict[str, Any] = params.extra_args or {}
            if _KEY in asked and params.seed is not None:
                settings = dict(asked[_KEY])
                number = self._numbers.setdefault((settings.pop("index"), params.seed), len(self._numbers))
                self._rows[index] = _Row(number, params.temperature, AdaptiveTemperature(**settings), written)
        for source, target, direction in batch_update.moved:
            moving, there = self._rows.pop(source, None), self._rows.pop(target, None)
            if moving is not None:
                self._rows[target] = moving
            if there is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = there

    def apply(self, logits: Tensor) -> Tensor:
        places: dict[tuple[float, AdaptiveTemperature], list[int]] = {}
        for place, row in self._rows.items():
            places.setdefault((row.temperature, row.adaptive), []).append(place)
        for (temperature, adaptive), indexes in places.items():
            at = torch.tensor(indexes, device=logits.device)
            base = torch.log_softmax(logits[at], dim=-1)  # l less its logsumexp, which is then 0
            factor = token_temperatures(entropy_of(base), temperature, adaptive) / temperature
            tempered = base / factor[:, None]
            logits[at] = tempered
            rows = [self._rows[place] for place in indexes]
            with_metrics = np.array(
                [[row.number for row in rows], [len(row.written) for row in rows]], dtype=np.int32
            )
            self._noted.append(
                (with_metrics, torch.stack([factor, factor * torch.logsumexp(tempered, dim=-1)]))
            )
        return logits

    def take(self) -> dict[_Request, _Noted]:
        """What was noted of each request since the last call, which is then forgotten."""
        if not self._noted:
            return {}
        numbers, positions = np.concatenate([with_metrics for with_metrics, _ in self._noted], axis=1)
        values = torch.cat([values for _, values in self._noted], dim=1).cpu().numpy()
        order = np.lexsort(
            (positions, numbers)
        )  # stable: of a token computed twice, the later draw stands last
        numbers, positions, values = numbers[order], positions[order], values[:, order]
        last = np.append((numbers[1:] != numbers[:-1]) | (positions[1:] != positions[:-1]), True)
        numbers, positions, values = numbers[last], positions[last], values[:, last]
        ends = np.searchsorted(numbers, np.arange(len(self._numbers) + 1))
        found = {
            request: (positions[ends[n] : ends[n + 1]], values[:, ends[n] : ends[n + 1]])
            for request, n in self._numbers.items()
        }
        self._noted.clear()
        self._numbers.clear()
        return found


def take_corrections(worker: Any) -> dict[_Request, _Noted]:
    """Runs in vLLM's worker: what its processor has noted."""
    [processor] = [
        one
        for one in worker.model_runner.input_batch.logitsprocs.all
        if isinstance(one, AdaptiveTemperatureProcessor)
    ]
    return processor.take()


@dataclass(frozen=True)
class Corrections:
    """Reported log-probs to log-probs at T0."""

    with_metrics: Mapping[_Request, _Noted]

    def at_base(self, index: int, seed: int, logprobs: Sequence[float]) -> tuple[float, ...]:
        """log-probs (t,) of completion ``seed`` of prompt ``index``.

        Raises RuntimeError where a token was not tempered.
        """
        positions, (factor, constant) = self.with_metrics.get(
            (index, seed), (np.empty(0, np.int32), np.empty((2, 0), np.float32))
        )
        if not np.array_equal(positions[: len(logprobs)], np.arange(len(logprobs))):
            raise RuntimeError(
                f"of a completion's {len(logprobs)} tokens vLLM drew some past the processor that adapts "
                "their temperature; "
                "this vLLM version is not supported, drop rollout.adaptive_temperature"
            )
        at_base = (
            np.asarray(logprobs) * factor[: len(logprobs)].astype(np.float64) + constant[: len(logprobs)]
        )
        return tuple(at_base.tolist())
