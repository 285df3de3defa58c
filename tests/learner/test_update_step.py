"""One optimizer update, without a learner."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.learner.micro_batches import row_micro_batches
from rltrain.learner.packing import MicroBatch
from rltrain.learner.trained_model import TrainedModel
from rltrain.learner.update_step import optimizer_update
from rltrain.loss.objective import ObjectiveShare
from rltrain.types.policy import TokenRows

ROWS = TokenRows(((5, 6), (7,), (5, 6)), ((8, 9, 1), (10, 1), (11, 1)))
LOGP = frozenset({"logp"})


def trained_model(path: str) -> TrainedModel:
    settings = LearnerCore(optimizer=Optimizer(lr=1e-2, max_grad_norm=1e9), tokens_per_micro_batch=8)
    return TrainedModel(Model(path=path), settings, total_updates=4, seed=0)


def gradients_at_step(trained: TrainedModel) -> dict[str, Tensor | None]:
    """A dictionary that receives every weight's gradient when the optimizer takes its step."""
    gradients: dict[str, Tensor | None] = {}
    take_step = trained.backend.step

    def step() -> tuple[float, bool]:
        gradients.update({name: weight.grad for name, weight in trained.unwrapped_model.named_parameters()})
        return take_step()

    trained.backend.step = step
    return gradients


def first_tokens(micro_batch: MicroBatch, statistics: Mapping[str, Tensor]) -> ObjectiveShare:
    """A loss that reads only the first token of each row."""
    loss = -statistics["logp"][:, 0].sum()
    return ObjectiveShare(loss, {"loss/rows": torch.tensor(float(len(micro_batch.rows)))})


def test_without_rows_the_backward_pass_still_reaches_every_weight(random_model: str) -> None:
    # In it the ranks of DDP, FSDP2 and ZeRO-3 wait for each other, whatever the loss is without rows.
    trained = trained_model(random_model)
    gradients = gradients_at_step(trained)
    nothing = row_micro_batches(trained, ROWS, torch.arange(0), share=False)
    assert len(nothing) == 1
    result = optimizer_update(trained, nothing, lambda *_: ObjectiveShare(torch.zeros(()), {}), wants=LOGP)
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
    assert result.stepped and result.metrics == {"loss/total": 0.0, "learner/grad_norm": 0.0}


def test_a_log_prob_that_the_loss_does_not_read_may_be_infinite(random_model: str) -> None:
    trained = trained_model(random_model)
    forward = trained.forward

    def with_an_infinite_token(micro_batch: MicroBatch, **options: object) -> dict[str, Tensor]:
        logp = forward(micro_batch, **options)["logp"]  # type: ignore[arg-type]
        second = torch.arange(logp.shape[1]) == 1
        return {"logp": torch.where(second, logp.detach() - math.inf, logp)}

    trained.forward = with_an_infinite_token
    micro_batches = row_micro_batches(trained, ROWS, torch.arange(len(ROWS)), share=False)
    result = optimizer_update(trained, micro_batches, first_tokens, wants=LOGP)
    assert result.stepped and math.isfinite(result.metrics["learner/grad_norm"])


def test_recorded_statistics_are_those_before_the_step_and_metrics_add_up(random_model: str) -> None:
    trained = trained_model(random_model)
    micro_batches = row_micro_batches(trained, ROWS, torch.arange(len(ROWS)), share=False)
    assert len(micro_batches) > 1
    recorded = {"logp": torch.zeros(3, 3)}
    first = optimizer_update(trained, micro_batches, first_tokens, wants=LOGP, record=recorded)
    assert first.metrics["loss/total"] == pytest.approx(-float(recorded["logp"][:, 0].sum()), rel=1e-6)
    assert first.metrics["loss/rows"] == len(ROWS)
    again = {"logp": torch.zeros(3, 3)}
    optimizer_update(trained, micro_batches, first_tokens, wants=LOGP, record=again)
    assert not torch.equal(recorded["logp"], again["logp"])
    assert [bool(row.all()) for row in recorded["logp"]] == [True, False, False]  # 0 where a row has no token
