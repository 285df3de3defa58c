"""Passes without gradients: a model's statistics of rows, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rltrain.learner.adapter_off import AdapterOff, FrozenModel
from rltrain.learner.alignment import is_alignment
from rltrain.learner.backend import set_mode
from rltrain.learner.forward import LAST_STATE
from rltrain.learner.micro_batches import MicroBatches, row_micro_batches, shares_prompts
from rltrain.learner.packing import MicroBatch
from rltrain.learner.trained_model import TrainedModel
from rltrain.types.policy import TokenRows

__all__ = [
    "compute_statistics",
    "last_states",
    "run_pass",
    "step_shape",
    "token_log_probs",
    "write_rows",
    "write_statistics",
]


@torch.no_grad()
def run_pass(
    module: nn.Module | AdapterOff,
    micro_batches: MicroBatches,
    forward: Callable[[MicroBatch], Mapping[str, Tensor]],
    results: Mapping[str, Tensor],
) -> None:
    """Write the results of ``forward`` for this rank's micro-batches into ``results``, in place.

    module: the model that ``forward`` calls; it is put into eval mode. results: by name, (B,) or (B, T), on
    the model's device, so that no micro-batch waits for a copy to the CPU.
    """
    set_mode(module, training=False)
    for micro_batch in micro_batches:
        values = forward(micro_batch)
        for name, result in results.items():
            write_rows(result, micro_batch, values[name])


def write_rows(result: Tensor, micro_batch: MicroBatch, values: Tensor) -> None:
    """Put the (r,) or (r, width) ``values`` of a micro-batch into ``result``, (B,) or (B, T), in place."""
    values = values.detach().float()
    if result.dim() == 1:
        result[micro_batch.rows] = values
    else:
        result[micro_batch.rows, : micro_batch.width] = values


def step_shape(rows: TokenRows) -> tuple[int, int]:
    """(B, T): rows, and tokens of the longest completion."""
    return len(rows), max(map(len, rows.completions))


def compute_statistics(
    trained: TrainedModel,
    rows: TokenRows,
    positions: Tensor,
    wants: frozenset[str],
    *,
    temperature: float,
    frozen: FrozenModel | None = None,
    row_values: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Statistics of the rows at ``positions``, (B, T) float32 each, 0 elsewhere, equal on every rank.

    A collective. frozen: the model to run; None: the trained one. row_values: (B,) numbers that
    statistics name as arguments.
    """
    names = sorted(wants)  # a set's order differs between ranks
    results = {name: torch.zeros(step_shape(rows), device=trained.device) for name in names}

    write_statistics(
        trained,
        results,
        rows,
        positions,
        temperature=temperature,
        frozen=frozen,
        row_values=row_values,
    )
    return trained.sum_each(results)


@torch.no_grad()
def last_states(trained: TrainedModel, rows: TokenRows) -> Tensor:
    """(R, H) float32 on the CPU, equal on every rank: the trained model's hidden state that predicts each
    row's last token. A collective.
    """
    states = torch.zeros(len(rows), trained.model.config.get_text_config().hidden_size, device=trained.device)
    module = trained.wrapped_model
    set_mode(module, training=False)
    wants = frozenset({"logp", LAST_STATE})
    for micro_batch in row_micro_batches(trained, rows, torch.arange(len(rows)), share=False):
        with trained.accelerator.autocast():
            values = module(micro_batch, temperature=1.0, wants=wants, chunk=trained.head_chunk)
        states[micro_batch.rows] = values[LAST_STATE].float()
    return trained.sum_over_ranks(states).cpu()


def token_log_probs(
    trained: TrainedModel,
    rows: TokenRows,
    *,
    temperature: float,
    frozen: FrozenModel | None = None,
) -> Tensor:
    """Log-probs of all rows, (B, T) nats, 0 after a row's last token; a collective."""
    positions = torch.arange(len(rows))
    wants = frozenset({"logp"})
    statistics = compute_statistics(trained, rows, positions, wants, temperature=temperature, frozen=frozen)
    return statistics["logp"]


def write_statistics(
    trained: TrainedModel,
    results: Mapping[str, Tensor],
    rows: TokenRows,
    positions: Tensor,
    *,
    temperature: float,
    frozen: FrozenModel | None = None,
    row_values: Mapping[str, Tensor] | None = None,
) -> None:
    """This rank's share of ``compute_statistics``, written into ``results``, (B, T) each, in place."""
    module = trained.wrapped_model if frozen is None else frozen
    wants = frozenset(results)
    reads_whole_rows = any(map(is_alignment, wants))
    share = shares_prompts(trained, frozen) and not reads_whole_rows

    def forward(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        arguments = {name: values[micro_batch.rows] for name, values in (row_values or {}).items()}
        chunk = trained.head_chunk
        with trained.accelerator.autocast():
            return module(
                micro_batch, temperature=temperature, wants=wants, chunk=chunk, row_values=arguments
            )

    run_pass(module, row_micro_batches(trained, rows, positions, share=share), forward, results)
