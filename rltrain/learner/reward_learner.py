"""Reward models with a scalar head: a causal language model that gives one number at each row's last token.

``PreferenceLearner`` trains one with ``scoring=REWARDS``. transformers loads and saves it as
``AutoModelForSequenceClassification`` with one label, so that other programs can use the trained reward
model. When training starts from a language model's folder, the head is new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rltrain.config.schema import Model
from rltrain.errors import UserError
from rltrain.learner.forward import PolicyForward, call_as_module, cannot_pack, scalar_head, takes_positions
from rltrain.learner.loading import open_folder, require_complete, without_dropout
from rltrain.learner.micro_batches import build_rows
from rltrain.learner.packing import MicroBatch
from rltrain.learner.row_scoring import RowScoring
from rltrain.learner.trained_model import TrainedModel
from rltrain.model_limits import rotary_limit
from rltrain.types.policy import TokenRows
from rltrain.types.preference import RewardPairs

__all__ = ["REWARDS", "RewardForward", "load_reward_model", "name_pad_token"]


class RewardForward(PolicyForward):
    """Wraps a model with a scalar head.

    Its rows have one extra token: see ``build_reward_rows``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.learning_rates = {}
        self.config = model.config  # DeepSpeed and FSDP2 read both from the module they are given
        self._no_split_modules = model._no_split_modules
        self._takes_positions = takes_positions(model)
        self._unpackable = cannot_pack(model)
        self.shares_prompts = None
        self._rotary = rotary_limit(model.config)

    @property
    def inner(self) -> Any:
        return self.model

    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        temperature: float,
        wants: frozenset[str],
        chunk: int,
        row_values: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``{"reward": (r,) float32}``, from the hidden state that would predict each row's extra token."""
        del temperature, wants, chunk, row_values
        last = torch.bincount(micro_batch.row, minlength=micro_batch.rows.shape[0]).cumsum(0) - 1
        hidden = self._hidden_states(self.inner, micro_batch).index_select(0, last)
        head = scalar_head(self.inner)
        assert head is not None

        def reward(state: Tensor) -> Tensor:
            with torch.autocast(state.device.type, enabled=False):
                bias = None if head.bias is None else head.bias.float()
                return linear(state.float(), head.weight.float(), bias)

        return {"reward": call_as_module(head, reward, hidden)[:, 0]}


def load_scalar_head(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """The recipe's model with a scalar head, in float32. dtype: of matrix products, not read."""
    del dtype
    return load_reward_model(model.path, model.revision, model.attention)


def reward_inputs(rewards: Tensor, sides: int) -> RewardPairs | Tensor:
    """The rewards (R,) of rows as a loss takes them. sides: rows per example."""
    if sides == 1:
        return rewards
    return RewardPairs(*rewards.chunk(2)) if len(rewards) else RewardPairs(rewards, rewards)


def build_reward_rows(trained: TrainedModel, rows: TokenRows, positions: Sequence[int]) -> MicroBatch:
    """The rows at ``positions`` with one extra token after each completion.

    The model does not read that token; the hidden state that would predict it is that of the row's last
    token.
    """
    prompts = tuple(rows.prompts[position] for position in positions)
    completions = tuple((*rows.completions[position], 0) for position in positions)
    micro_batch = build_rows(trained, TokenRows(prompts, completions), range(len(positions)))
    return dataclasses.replace(micro_batch, rows=torch.tensor(positions, dtype=torch.int64))


REWARDS = RowScoring(
    load=load_scalar_head,
    wrap=RewardForward,
    statistic="reward",
    row_numbers=dict,
    loss_inputs=reward_inputs,
    build_rows=build_reward_rows,
    predicts_tokens=False,
)


def name_pad_token(model: PreTrainedModel, pad: int | None, stop: Collection[int]) -> None:
    """Name the pad token in the config, for programs that batch with padding: transformers scores a text at
    its last token that is not the pad token.

    A pad token that also ends texts is not named, since transformers would skip it there; such a folder
    scores one text at a time.
    """
    model.config.pad_token_id = None if pad in stop else pad


def load_reward_model(
    path: str, revision: str | None, attention: str, *, trained: bool = False, decoder: bool = True
) -> PreTrainedModel:
    """A model with a scalar head, in float32, without dropout.

    trained: the folder must have a head; otherwise a missing head starts at random. decoder: the model must
    be a decoder with a linear head named score, the only kind that can be trained here. Raises UserError
    where no such model can be made, or where tensors other than the head are missing.
    """
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    options |= {} if trained else {"num_labels": 1}
    model, report = open_folder(
        AutoModelForSequenceClassification, path, revision, dtype=torch.float32, **options
    )
    require_complete(path, model, report, "scalar" if trained else "new scalar")
    if model.config.num_labels != 1:
        raise UserError(f"{path} has {model.config.num_labels} outputs; a reward model has 1")
    if decoder and scalar_head(model) is None:
        raise UserError(
            f"{path}: {type(model).__name__} is no decoder with a linear output named score; choose a "
            "causal language model"
        )
    return without_dropout(model)
