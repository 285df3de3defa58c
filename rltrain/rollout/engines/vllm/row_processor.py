"""The rows of vLLM's batch for which a logits processor of its V1 model runner has work."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

__all__ = ["RequestId", "RowProcessor"]

RequestId = tuple[int, int]  # (number of the prompt in its call of generate, the completion's own seed)
Row = TypeVar("Row")


class RowProcessor(LogitsProcessor, Generic[Row]):
    """Follows the rows whose requests have ``key`` in their ``SamplingParams.extra_args``."""

    key: str

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self.rows: dict[int, Row] = {}
        self.numbers: dict[RequestId, int] = {}  # of the requests, in order of arrival

    @abstractmethod
    def make_row(self, settings: Mapping[str, Any], params: Any, tokens: Sequence[int]) -> Row:
        """The row of a new request. settings: its entry of ``extra_args``; tokens: vLLM's own growing list of
        the completion's tokens.
        """

    def number_request(self, index: int, seed: int) -> int:
        return self.numbers.setdefault((index, seed), len(self.numbers))

    def is_argmax_invariant(self) -> bool:
        """True also means that vLLM applies the processor after the temperature, just before it draws."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, tokens in batch_update.added:
            self.rows.pop(index, None)
            arguments: dict[str, Any] = params.extra_args or {}
            if self.key in arguments and params.seed is not None:
                self.rows[index] = self.make_row(arguments[self.key], params, tokens)
        for source, target, direction in batch_update.moved:
            moved = self.rows.pop(source, None)
            replaced = self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = replaced
