"""Updates from judged examples: pairs of completions, or single ones. Weights, optimizer, ranks and memory path are the learner's.

Rows of N pairs are 2N: the chosen completions, then the rejected ones, in the same order. Both rows of a pair go through the model
in one micro-batch. As for rollouts, every rank holds the whole optimizer batch and plans the same micro-batches; statistics are taken
over all of it before it is cut, and losses are divided by its number of examples, so that no layout changes a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.config.schema import Learner, LearnerCore, Model
from rltrain.learner.accelerate_learner import AccelerateLearner, load_causal_lm
from rltrain.learner.backend import set_mode
from rltrain.learner.forward import PolicyForward
from rltrain.learner.packing import MicroBatch, build, plan
from rltrain.learner.shared_prompt import build_shared
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.statistics import prepared
from rltrain.types import ExampleTotals, LabelBatch, PairBatch, PolicyPairs, PolicySequences, TokenRows
from rltrain.watchdog import Waiting, unwatched

__all__ = ["ExampleUpdate", "PreferenceLearner", "lengths_of", "pair_rows", "policy_of"]

_SHARE_BELOW = 0.95  # of the tokens that reading every row by itself would take


@dataclass(frozen=True)
class ExampleUpdate:
    """What one update did."""

    metrics: dict[str, float]  # the loss and the means of what it reports, over the update's examples
    stepped: bool  # False: dropped for a non-finite loss or gradient
    tokens: int  # read by the gradient pass, prompts included
    shared: bool  # pairs' prompts were read once


def pair_rows(prompts: Sequence[tuple[int, ...]], chosen: Sequence[tuple[int, ...]], rejected: Sequence[tuple[int, ...]]) -> TokenRows:
    """The 2N rows of N pairs."""
    return TokenRows((*prompts, *prompts), (*chosen, *rejected))


def lengths_of(rows: TokenRows) -> Tensor:
    """(R,) scored tokens of each row."""
    return torch.tensor([len(completion) for completion in rows.completions])


class PreferenceLearner(AccelerateLearner):
    """An ``AccelerateLearner`` whose update takes judged examples."""

    def __init__(
        self, model: Model, settings: LearnerCore, *, max_tokens: int, total_updates: int, seed: int, waiting: Waiting = unwatched
    ) -> None:
        plain = Learner(**{name: getattr(settings, name) for name in type(settings).model_fields})
        super().__init__(model, plain, temperature=1.0, max_tokens=max_tokens, total_updates=total_updates, seed=seed, waiting=waiting)
        self.shares = self._shares(self.policy)

    # log-probs -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def frozen_model(self, path: str | None, model: Model) -> Iterator[PolicyForward]:
        """A model that is not trained, loaded for as long as the block lasts. path None: ``model`` as it started."""
        loaded = load_causal_lm(path or model.path, None if path else model.revision, model.attention)
        yield PolicyForward(loaded.requires_grad_(False)).to(self.device).eval()

    @staticmethod
    def weights_of(policy: PolicyForward) -> Iterator[tuple[str, Tensor]]:
        """A frozen model's weights under the names that ``model_weights`` gives the learner's own."""
        yield from ((name.removeprefix("model."), weight) for name, weight in policy.state_dict().items())

    def log_probs(self, rows: TokenRows, *, sides: int, policy: Any = None) -> Tensor:
        """(R,) nats, sums over each row's completion, float32 on the CPU, equal on every rank.

        sides: rows per example, 2 for the rows of pairs. policy: a frozen model; None: the learner's own.
        """

        def numbers(policy: Any, micro: MicroBatch) -> dict[str, Tensor]:
            return {"logp": self._row_numbers(policy, micro)}

        return self._over_rows(rows, sides, policy or self.policy, ("logp",), numbers)["logp"]

    def log_probs_and_entropy(self, rows: TokenRows, *, sides: int) -> tuple[Tensor, Tensor | None]:
        """``log_probs`` of the learner's own weights and (R,) nats, the entropies of each completion's tokens summed, in one pass.

        None where the model's output is no distribution over tokens.
        """
        wants = frozenset({"logp", "entropy"})

        def numbers(policy: Any, micro: MicroBatch) -> dict[str, Tensor]:
            return self._row_sums(policy, micro, wants)

        found = self._over_rows(rows, sides, self.policy, sorted(wants), numbers)
        return found["logp"], found["entropy"]

    @torch.no_grad()
    def _over_rows(
        self, rows: TokenRows, sides: int, policy: Any, names: Iterable[str], numbers: Callable[[Any, MicroBatch], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """(R,) each: ``numbers(policy, micro-batch)`` of all rows, float32 on the CPU, equal on every rank."""
        found = {name: torch.zeros(len(rows)) for name in names}
        set_mode(policy, training=False)
        for micro in self._examples_micro_batches(rows, sides)[0]:
            with self.accelerator.autocast():
                values = numbers(policy, micro)
            for name, kept in found.items():
                kept[micro.rows.cpu()] = values[name].float().cpu()
        return {name: self._sum(kept).cpu() for name, kept in found.items()}

    def token_log_probs(self, rows: TokenRows, policy: Any = None) -> Tensor:
        """(R, T) nats of each completion token, 0 behind the last, float32 on the CPU, equal on every rank. policy: as above."""
        return self._collect(policy or self.policy, rows, torch.arange(len(rows)), frozenset({"logp"}))["logp"]

    def inputs_of(self, numbers: Tensor, sides: int) -> Any:
        """What a loss takes, of one number (R,) for each row."""
        return policy_of(numbers, sides)

    def _row_numbers(self, policy: Any, micro: MicroBatch) -> Tensor:
        """(r,) nats, float32: the log-prob of each row's completion."""
        return self._row_sums(policy, micro, frozenset({"logp"}))["logp"]

    def _row_sums(self, policy: Any, micro: MicroBatch, wants: frozenset[str]) -> dict[str, Tensor]:
        """(r,) each, float32: token statistics summed over each row's completion."""
        values = policy(micro, temperature=1.0, wants=wants, chunk=self.settings.head_chunk)
        return {name: value.sum(1) for name, value in values.items()}

    # updates ---------------------------------------------------------------------------------------------------------

    def update_examples(
        self, rows: TokenRows, batch: PairBatch | LabelBatch, objective: PreferenceObjective, mismatched: TokenRows | None = None
    ) -> ExampleUpdate:
        """One optimizer update over all rows.

        batch: the whole optimizer batch, equal on every rank, with the frozen models' log-probs in it. mismatched: for KTO, row i
        is prompt i with another prompt's completion. Raises NonFiniteError after ``max_nonfinite`` bad updates in a row.
        """
        sides = 2 if isinstance(batch, PairBatch) else 1
        batch = prepared(self._with_logp_now(rows, batch, objective.needs, sides, mismatched), objective.loss)
        totals, sums = ExampleTotals(examples=len(batch)), dict[str, Tensor]()
        loss = torch.zeros((), device=self.device)
        micro_batches, shared = self._examples_micro_batches(rows, sides)
        set_mode(self.policy, training=True)
        for number, micro in enumerate(micro_batches):
            with self.backend.micro_batch(last=number == len(micro_batches) - 1):
                logp = self._row_numbers(self.policy, micro)
                part = batch.rows(micro.rows[: len(micro.rows) // sides].cpu()).to(self.device)
                share = objective(self.inputs_of(logp, sides), part, totals)
                self._backward(share.loss + 0.0 * logp.sum())  # without examples too, every rank joins in its peers' collectives
            loss += share.loss.detach()
            for name, value in share.metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        metrics = self._reduced({"loss/total": loss, **sums})
        metrics["learner/grad_norm"], stepped = self._step(metrics["loss/total"])
        return ExampleUpdate(metrics, stepped, self._tokens(rows, sides, shared), shared)

    def _with_logp_now(
        self, rows: TokenRows, batch: PairBatch | LabelBatch, needs: frozenset[str], sides: int, mismatched: TokenRows | None
    ) -> PairBatch | LabelBatch:
        """``batch`` with the policy's own log-probs as they are before this update, where the loss's statistics need them."""
        if isinstance(batch, LabelBatch) and "mismatched" in needs:
            if mismatched is None or batch.mismatched is None:
                raise ValueError("the loss compares prompts with other prompts' completions, but no mismatched rows were given")
            now = dataclasses.replace(batch.mismatched, logp_now=self.log_probs(mismatched, sides=1))
            batch = dataclasses.replace(batch, mismatched=now)
        if "logp_now" not in needs:
            return batch
        logp = self.log_probs(rows, sides=sides)
        if isinstance(batch, LabelBatch):
            return dataclasses.replace(batch, completion=dataclasses.replace(batch.completion, logp_now=logp))
        chosen, rejected = logp.chunk(2)
        return dataclasses.replace(
            batch,
            chosen=dataclasses.replace(batch.chosen, logp_now=chosen),
            rejected=dataclasses.replace(batch.rejected, logp_now=rejected),
        )

    # micro-batches ---------------------------------------------------------------------------------------------------

    def _examples_micro_batches(self, rows: TokenRows, sides: int) -> tuple[list[MicroBatch], bool]:
        """This rank's micro-batches, equally many on every rank and at least one; and whether they share prompts."""
        count = len(rows) // sides
        if count * sides != len(rows):
            raise ValueError(f"{len(rows)} rows are not those of examples with {sides} each")
        apart, together = _sizes(rows, sides, self.layout), _shared_sizes(rows) if sides == 2 else []
        shared = self.shares and sides == 2 and sum(together) < _SHARE_BELOW * sum(apart)
        sizes = together if shared else apart
        planned = plan(sizes, self.settings.tokens_per_micro_batch, layout=self.layout, ranks=self.ranks)[self.rank]
        made = [self._built(rows, examples, count, sides, shared) for examples in planned or [[]]]
        return made, shared

    def _built(self, rows: TokenRows, examples: list[int], count: int, sides: int, shared: bool) -> MicroBatch:
        if shared and examples:
            pairs = [(at, count + at) for at in examples]
            return build_shared(rows, pairs, order=[*examples, *(second for _, second in pairs)], device=self.device)
        positions = [side * count + at for side in range(sides) for at in examples]
        return build(rows, positions, layout=self.layout, device=self.device)

    def _tokens(self, rows: TokenRows, sides: int, shared: bool) -> int:
        return sum(_shared_sizes(rows)) if shared else sum(map(len, rows.prompts)) + sum(map(len, rows.completions))


def _sizes(rows: TokenRows, sides: int, layout: str) -> list[int]:
    """Tokens that each example takes in a micro-batch; padded, its rows are as long as the longer one."""
    count = len(rows) // sides
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(rows.prompts, rows.completions, strict=True)]
    of = [[lengths[side * count + at] for side in range(sides)] for at in range(count)]
    return [sum(both) if layout == "packed" else sides * max(both) for both in of]


def _shared_sizes(rows: TokenRows) -> list[int]:
    """Tokens of each pair with its prompt read once."""
    count = len(rows) // 2
    return [len(rows.prompts[at]) + len(rows.completions[at]) + len(rows.completions[count + at]) for at in range(count)]


def policy_of(logp: Tensor, sides: int) -> PolicyPairs | PolicySequences:
    """The log-probs (R,) of rows as a loss takes them."""
    if sides == 1:
        return PolicySequences(logp)
    chosen, rejected = logp.chunk(2) if len(logp) else (logp, logp)
    return PolicyPairs(PolicySequences(chosen), PolicySequences(rejected))
