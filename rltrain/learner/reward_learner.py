"""Training a reward model with a scalar head: a causal language model whose output is one number at each row's last token.

It is what transformers loads and saves as ``AutoModelForSequenceClassification`` with one label, so that a finished run is a reward model
for other programs as well. Started from a language model's folder, the head is new; everything else is the offline loop's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rltrain.config.schema import Model
from rltrain.errors import UserError
from rltrain.learner.forward import PolicyForward, called_as, scalar_head, takes_positions, unpackable
from rltrain.learner.loading import open_folder, require_complete, without_dropout
from rltrain.learner.packing import MicroBatch, build
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.model_limits import rotary_limit
from rltrain.types import RewardPairs, TokenRows

__all__ = ["RewardForward", "RewardLearner", "load_reward_model"]


class RewardForward(PolicyForward):
    """Wraps a model with a scalar head. Rows come with one token more than they have: see ``RewardLearner``."""

    def __init__(self, model: PreTrainedModel) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.config = model.config  # DeepSpeed and FSDP2 read both from the module they are given
        self._no_split_modules = model._no_split_modules
        self._takes_positions, self._unpackable = takes_positions(model), unpackable(model)
        self.shares_prompts = False
        self._rotary = rotary_limit(model.config)

    @property
    def inner(self) -> Any:
        return self.model

    def forward(
        self, micro: MicroBatch, *, temperature: float, wants: frozenset[str], chunk: int, given: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """``{"reward": (r,) float32}``, of the hidden state that would predict each row's last token."""
        del temperature, wants, chunk, given
        last = torch.bincount(micro.row, minlength=micro.rows.shape[0]).cumsum(0) - 1
        hidden = self._hidden_states(self.inner, micro).index_select(0, last)
        head = scalar_head(self.inner)
        assert head is not None

        def reward(state: Tensor) -> Tensor:
            with torch.autocast(state.device.type, enabled=False):
                return linear(state.float(), head.weight.float(), None if head.bias is None else head.bias.float())

        return {"reward": called_as(head, reward, hidden)[:, 0]}


class RewardLearner(PreferenceLearner):
    """A ``PreferenceLearner`` whose rows give the scalar head's reward in place of a log-prob."""

    def _pretrained(self, model: Model) -> PreTrainedModel:
        return load_reward_model(model.path, model.revision, model.attention)

    def _wrapped(self, pretrained: PreTrainedModel) -> PolicyForward:
        return RewardForward(pretrained)

    def name_pad(self, pad: int | None, stop: Collection[int]) -> None:
        """For programs that batch with padding: transformers takes the last token that is no pad. One that also ends texts would be passed
        over at their end, so it is not named, and such a folder scores one text at a time."""
        self.model.config.pad_token_id = None if pad in stop else pad

    def inputs_of(self, numbers: Tensor, sides: int) -> RewardPairs | Tensor:
        if sides == 1:
            return numbers
        return RewardPairs(*numbers.chunk(2)) if len(numbers) else RewardPairs(numbers, numbers)

    def log_probs_and_entropy(self, rows: TokenRows, *, sides: int) -> tuple[Tensor, Tensor | None]:
        return self.log_probs(rows, sides=sides), None

    def _row_numbers(self, policy: Any, micro: MicroBatch) -> Tensor:
        """(r,) rewards, float32."""
        return policy(micro, temperature=1.0, wants=frozenset({"reward"}), chunk=self.settings.head_chunk)["reward"]

    def _built(self, rows: TokenRows, examples: list[int], count: int, sides: int, shared: bool) -> MicroBatch:
        """With one token more behind each completion: it is not read, and the state that would predict it is the true last one's."""
        del shared
        positions = [side * count + at for side in range(sides) for at in examples]
        longer = TokenRows(tuple(rows.prompts[at] for at in positions), tuple((*rows.completions[at], 0) for at in positions))
        micro = build(longer, range(len(positions)), layout=self.layout, device=self.device)
        return dataclasses.replace(micro, rows=torch.tensor(positions, dtype=torch.int64, device=self.device))


def load_reward_model(path: str, revision: str | None, attention: str, *, trained: bool = False, decoder: bool = True) -> PreTrainedModel:
    """In float32, without dropout. The head of a folder that has none starts at random, or with ``trained`` is an error.

    decoder: it must have a linear head named score over a decoder, which is what can be trained here. Raises UserError where no such
    model can be made, or where other tensors than the head are missing.
    """
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    options |= {} if trained else {"num_labels": 1}
    model, report = open_folder(AutoModelForSequenceClassification, path, revision, dtype=torch.float32, **options)
    require_complete(path, model, report, "scalar" if trained else "new scalar")
    if model.config.num_labels != 1:
        raise UserError(f"{path} has {model.config.num_labels} outputs; a reward model has 1")
    if decoder and scalar_head(model) is None:
        raise UserError(f"{path}: {type(model).__name__} has no linear output named score over a decoder; choose a causal language model")
    return without_dropout(model)
