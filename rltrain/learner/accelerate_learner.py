"""The learner: annotates a step's rows and takes the optimizer updates, on one process or many.

Every rank holds the whole step (token ids and the small tensors) and plans the same micro-batches, so what is computed does
not depend on how many ranks there are: each rank runs its share, and counts, losses and statistics are sums over all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from rltrain.config.schema import Learner, Model
from rltrain.control.stage import Adjustment
from rltrain.learner.alignment import is_alignment
from rltrain.learner.backend import Backend, DeepSpeedBackend, prepare, set_mode
from rltrain.learner.forward import PolicyForward, resolve_layout
from rltrain.learner.head import STATISTICS
from rltrain.learner.loading import load_causal_lm, require_repeatable
from rltrain.learner.optim import build_optimizer, build_schedule, restore_schedule
from rltrain.learner.packing import Layout, MicroBatch, build, plan
from rltrain.learner.ranks import agree, make_accelerator, mixed_precision, sharded_loading
from rltrain.learner.shared_prompt import build_shared, line_length, lines_of
from rltrain.loss.objective import Objective
from rltrain.model_limits import context_of
from rltrain.seeds import stable_hash
from rltrain.types import PolicyTokens, StepTotals, TokenRows, TrainBatch
from rltrain.watchdog import Waiting, unwatched
from rltrain.weight_names import CheckpointNames

__all__ = ["FROZEN", "ROUNDING", "AccelerateLearner", "NonFiniteError", "UpdateStats", "agree", "load_causal_lm"]

FROZEN = frozenset({"ref_logp", "teacher_logp"})  # statistics of models that are not trained
ROUNDING = {"no": 1e-4, "bf16": 0.05, "fp16": 0.02}  # nats per token, by precision: what two passes over one row may differ by
_PROBE_TOKENS = 128


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not a finite number."""


@dataclass(frozen=True)
class UpdateStats:
    """What one call of ``update`` did. Tensors are on the CPU."""

    logp: Tensor  # (B, T) nats, the sampling policy's log-probs as the learner computes them
    entropy: Tensor  # (B, T) nats
    metrics: dict[str, float]  # averaged over the step's updates
    idle_rows: int  # rows that skipped the gradient pass
    skipped_updates: int  # updates dropped for a non-finite loss or gradient
    trained_rows: int
    trained_tokens: int


class AccelerateLearner:
    """Owns the policy's weights. ``version`` counts the optimizer updates taken: it names the weights.

    waiting: wraps every wait for the other ranks that is not inside a forward or backward pass.
    """

    def __init__(
        self,
        model: Model,
        settings: Learner,
        *,
        temperature: float,
        max_tokens: int,
        total_updates: int,
        seed: int,
        waiting: Waiting = unwatched,
    ) -> None:
        self.settings, self.temperature, self.max_tokens, self.seed = settings, temperature, max_tokens, seed
        self._waiting = waiting
        self.accelerator: Any = make_accelerator(mixed_precision(settings.precision))
        torch.manual_seed(seed)
        with sharded_loading(self.accelerator):
            pretrained = self._pretrained(model)
        self.names = CheckpointNames(pretrained)
        self.layout: Layout = resolve_layout(settings.layout, pretrained)
        if settings.gradient_checkpointing:
            pretrained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.bare = policy = self._wrapped(pretrained)  # without accelerate's wrapper
        optimizer = build_optimizer(policy.named_parameters(), settings.optimizer)
        self.schedule = build_schedule(optimizer, settings.optimizer, total_updates)
        self.backend: Backend = prepare(self.accelerator, policy, optimizer, settings.optimizer.max_grad_norm)
        self.policy, self.optimizer = self.backend.policy, self.backend.optimizer
        self.policy.train()  # every module: transformers loads its own in eval mode
        micro = build(_probe(self.model.config), [0], layout=self.layout, device=self.device)
        require_repeatable(self.policy, micro, path=model.path, tolerance=ROUNDING[str(self.accelerator.mixed_precision)])
        if isinstance(self.backend, DeepSpeedBackend) and self.accelerator.mixed_precision != "no":
            self._set_masters(model)
        self.frozen: dict[str, PolicyForward] = {}  # models whose log-probs a recipe needs: ref_logp, teacher_logp
        self.version = 0
        self._nonfinite_in_a_row = 0

    def _pretrained(self, model: Model) -> PreTrainedModel:
        """The weights to train."""
        return load_causal_lm(model.path, model.revision, model.attention)

    def _wrapped(self, pretrained: PreTrainedModel) -> PolicyForward:
        return PolicyForward(pretrained)

    # ranks -----------------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def gather_objects(self, objects: Sequence[Any]) -> list[Any]:
        """The lists of all ranks, concatenated in rank order."""
        if self.ranks == 1:
            return list(objects)
        with self._waiting("the other ranks", "to hand over theirs"):
            return gather_object(list(objects))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.ranks == 1:
            return value
        with self._waiting("rank 0", "to hand over its value"):
            return broadcast_object_list([value])[0]

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        return any(self.gather_objects([flag]))

    # state -----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything an update depends on but the weights: tensors by parameter name (empty but on rank 0), numbers as JSON.

        A collective. Any backend and number of ranks goes on with what another one wrote.
        """
        with self._waiting("the other ranks", "to hand over their shards of the optimizer's state"):
            tensors = self.backend.state(self._named(), keep=self.rank == 0)
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        counts = {"version": self.version, "schedule": self.schedule.last_epoch, "nonfinite_in_a_row": self._nonfinite_in_a_row}
        return tensors, {**counts, "scaler": scaler}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; the weights are those this learner was made from. Raises ValueError for another model's."""
        self.backend.restore(self._named(), tensors)
        restore_schedule(self.schedule, values["schedule"])
        self.version, self._nonfinite_in_a_row = values["version"], values["nonfinite_in_a_row"]
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters by the names of the bare model, which no wrapper changes."""
        return [(name.removeprefix("model."), parameter) for name, parameter in self.bare.named_parameters()]

    # weights ---------------------------------------------------------------------------------------------------------

    def use_frozen(self, statistic: str, path: str | None, model: Model) -> None:
        """Load the model of ``statistic``, "ref_logp" or "teacher_logp", for ``annotate``. path: None is ``model`` as it started."""
        frozen = load_causal_lm(path or model.path, None if path else model.revision, model.attention)
        self.frozen[statistic] = PolicyForward(frozen.requires_grad_(False)).to(self.device).eval()

    @property
    def model(self) -> PreTrainedModel:
        """The bare transformers model behind every wrapper."""
        return self.bare.inner

    def state_dict(self) -> dict[str, Tensor]:
        """Full, unsharded weights under the names inside the model, as ``save_pretrained`` takes them. A collective: every rank
        calls it; all but rank 0 may throw it away."""
        return dict(self.model_weights())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """One by one, by checkpoint name, on every rank, in float32 as the optimizer has them; of what transformers fuses, the
        parts. A collective: every rank takes all of them."""
        return self.names.to_checkpoint(self.model_weights())

    def model_weights(self) -> Iterator[tuple[str, Tensor]]:
        """``weights`` by their names inside the model."""
        for name, tensor in self.bare.state_dict(keep_vars=True).items():
            with self._waiting("the other ranks", f"to hand over their shards of {name}"):
                whole = self.backend.whole(tensor)
            yield name.removeprefix("model."), whole

    def _set_masters(self, model: Model) -> None:
        """Give the optimizer the float32 weights of the model folder where the backend rounded its own copies."""
        torch.manual_seed(self.seed)  # where a head starts at random, the same one
        exact = self._pretrained(model).state_dict()
        assert isinstance(self.backend, DeepSpeedBackend)
        self.backend.set_masters(self._named(), exact)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    # passes ----------------------------------------------------------------------------------------------------------

    def annotate(self, rows: TokenRows, wants: frozenset[str], powers: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """No-grad passes over all rows: ``{"logp", "entropy", "ref_logp", "teacher_logp", ...}`` to ``(B, T)`` tensors, equal on
        every rank.

        powers: for each name "ref_log_mass:..." in ``wants`` the (B,) powers of the reference's probabilities that it sums.
        """
        everything, powers = torch.arange(len(rows)), powers or {}
        found: dict[str, Tensor] = {}
        for name in sorted(FROZEN & wants):
            if name not in self.frozen:
                raise RuntimeError(f"{name} was asked for but its model is not loaded; call use_frozen first")
            found[name] = self._collect(self.frozen[name], rows, everything, frozenset({"logp"}))["logp"]
        for name, power in powers.items():
            mass = frozenset({"log_mass:power"})
            found[name] = self._collect(self.frozen["ref_logp"], rows, everything, mass, {"power": power})["log_mass:power"]
        own = wants - FROZEN - powers.keys()
        if own:
            found |= self._collect(self.policy, rows, everything, own)
        return found

    def update(self, rows: TokenRows, batch: TrainBatch, objective: Objective, adjust: Adjustment | None = None) -> UpdateStats:
        """``settings.epochs`` passes of ``settings.updates`` optimizer updates over the step's rows.

        batch: the whole step, equal on every rank. adjust: controls that look at the current policy; they see one optimizer
        batch at a time, with ``logp_now`` and ``entropy_now`` filled in as they need. Raises NonFiniteError after
        ``max_nonfinite`` bad updates in a row.
        """
        seen = {name: torch.zeros(_shape(rows)) for name in ("logp", "entropy")}
        parts: list[dict[str, float]] = []
        idle = skipped = trained_rows = trained_tokens = 0
        for epoch in range(self.settings.epochs):
            for number, positions in enumerate(self._split(batch.group, epoch)):
                part = batch.rows(positions)
                if adjust is not None:
                    part = adjust(self._with_current(rows, part, positions, adjust.needs, first=epoch == 0 and number == 0))
                one = self._one_update(rows, part, positions, objective, seen if epoch == 0 else None)
                parts.append(one.metrics | {f"control/{name}": value for name, value in part.notes.items()})
                idle, skipped = idle + one.idle_rows, skipped + (not one.stepped)
                trained_rows, trained_tokens = trained_rows + one.trained_rows, trained_tokens + one.trained_tokens
        seen = {name: self._sum(value).cpu() for name, value in seen.items()}
        metrics = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        return UpdateStats(seen["logp"], seen["entropy"], metrics, idle, skipped, trained_rows, trained_tokens)

    # one update ------------------------------------------------------------------------------------------------------

    def _one_update(
        self, rows: TokenRows, batch: TrainBatch, positions: Tensor, objective: Objective, seen: dict[str, Tensor] | None
    ) -> _OneUpdate:
        """One optimizer update over the rows ``positions``; ``batch`` holds exactly those rows, in that order."""
        tokens, sequences = batch.totals_of_mask
        totals = StepTotals(tokens=tokens, sequences=sequences, max_tokens=self.max_tokens)
        idle = objective.idle_rows(batch) if self.settings.skip_idle_rows else torch.zeros(len(positions), dtype=torch.bool)
        if seen is not None and idle.any():
            self._collect_into(seen, rows, positions[idle])
        active = torch.nonzero(~idle).flatten()
        wants = _wants(objective.needs) | ({"entropy"} if seen is not None else frozenset())
        sums: dict[str, Tensor] = {}
        loss = torch.zeros((), device=self.device)
        mine = self._micro_batches(rows, positions[active], self._shares(self.policy))
        set_mode(self.policy, training=True)
        for number, lines in enumerate(mine):
            with self.backend.micro_batch(last=number == len(mine) - 1):
                chosen, micro = self._micro_batch(rows, positions[active], lines)
                statistics = self.policy(micro, temperature=self.temperature, wants=wants, chunk=self.settings.head_chunk)
                part = batch.rows(active[chosen], width=micro.width).to(self.device)
                share = objective(_policy_tokens(statistics), part, totals)
                self._backward(share.loss)
            loss += share.loss.detach()
            for name, value in share.metrics.items():
                sums[name] = sums.get(name, 0.0) + value
            if seen is not None:
                for name, values in seen.items():
                    values[micro.rows.cpu(), : micro.width] = statistics[name].detach().float().cpu()
        metrics = self._reduced({"loss/total": loss, **sums})
        metrics["learner/grad_norm"], stepped = self._step(metrics["loss/total"])
        trained = sum(_lengths(rows, positions[active]))
        return _OneUpdate(metrics, int(idle.sum()), stepped, len(active), trained)

    def _backward(self, share: Tensor) -> None:
        """Add the gradient of this micro-batch's share of the loss; inside ``backend.micro_batch``.

        A share that is not finite makes the whole gradient not finite, on every rank, so that ``_step`` has one thing to look at.
        """
        poison = torch.where(share.detach().isfinite(), 1.0, math.nan)
        # DDP, FSDP and DeepSpeed average gradients over ranks: undo it.
        self.backend.backward(share * poison * self.ranks)

    def _step(self, loss: float) -> tuple[float, bool]:
        """Take the optimizer step unless the gradient is not finite: its norm before clipping, and whether. Equal on every rank.

        loss: for the message. Raises NonFiniteError after ``max_nonfinite`` updates in a row that could not be taken; an overflow
        by which float16 finds its loss scale does not count.
        """
        grad_norm, taken = self.backend.step()
        if taken:
            self.schedule.step()
            self.version += 1
            self._nonfinite_in_a_row = 0
        elif not (math.isfinite(loss) and self.backend.seeks_scale):
            self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= self.settings.max_nonfinite:
            raise NonFiniteError(
                f"{self._nonfinite_in_a_row} updates in a row had a non-finite loss ({loss}) or gradient norm ({grad_norm}); the weights "
                f"are those of version {self.version}. Lower learner.optimizer.lr, or look at the rewards and at learner.precision"
            )
        return grad_norm, taken

    def _shares(self, policy: Any) -> bool:
        """Whether rows of one prompt may share it."""
        forward = self.bare if policy is self.policy else policy  # behind the wrapper of a backend
        return self.settings.share_prompt == "auto" and self.layout == "padded" and forward.shares_prompts

    def _micro_batches(self, rows: TokenRows, positions: Tensor, share: bool) -> list[list[list[int]]]:
        """This rank's micro-batches, each of lines of indices into ``positions``; every rank has the same number, at least one.

        A line is one row, or several that share a prompt.
        """
        at, budget = positions.tolist(), self.settings.tokens_per_micro_batch
        lines = lines_of(rows, at, hidden=self.model.config.hidden_size, budget=budget) if share else [[index] for index in range(len(at))]
        sizes = [line_length(rows, [at[index] for index in line]) for line in lines]
        mine = plan(sizes, budget, layout=self.layout, ranks=self.ranks)[self.rank]
        # An empty micro-batch gives zero gradients, so that momentum and weight decay act as they should.
        return [[lines[number] for number in chosen] for chosen in mine] or [[]]

    def _micro_batch(self, rows: TokenRows, positions: Tensor, lines: list[list[int]]) -> tuple[list[int], MicroBatch]:
        """The indices into ``positions`` of one micro-batch's rows, in its order, and the micro-batch."""
        chosen = [index for line in lines for index in line]
        if len(chosen) == len(lines):
            return chosen, build(rows, positions[chosen].tolist(), layout=self.layout, device=self.device)
        return chosen, build_shared(rows, [positions[line].tolist() for line in lines], device=self.device)

    def _split(self, group: Tensor, epoch: int) -> list[Tensor]:
        """The step's rows in ``settings.updates`` parts of whole groups, in an order seeded by version and epoch.

        A step that dynamic sampling left with fewer groups than updates makes one update per group.
        """
        ids = torch.unique(group)
        parts = min(self.settings.updates, len(ids))
        if parts == 1:
            return [torch.arange(len(group))]
        generator = torch.Generator().manual_seed(stable_hash(self.seed, "split", self.version, epoch))
        shuffled = ids[torch.randperm(len(ids), generator=generator)]
        return [torch.nonzero(torch.isin(group, part)).flatten() for part in shuffled.tensor_split(parts)]

    def _with_current(self, rows: TokenRows, part: TrainBatch, positions: Tensor, needs: frozenset[str], *, first: bool) -> TrainBatch:
        """``part`` with the current policy's statistics ``needs``. On a step's first update the old ones are current.

        ``logp_now`` and ``entropy_now`` are fields, further statistics of the head ("<statistic>_now") go to ``extra``.
        """
        found = {"logp_now": part.old_logp, "entropy_now": part.old_entropy} if first else {}
        missing = {name: name.removesuffix("_now") for name in needs if found.get(name) is None}
        if missing:
            current = self._collect(self.policy, rows, positions, frozenset(missing.values()))
            found = found | {name: current[statistic][positions] for name, statistic in missing.items()}
        fields = {"logp_now", "entropy_now"} & needs
        extra = {name: value for name, value in found.items() if name in needs - fields and value is not None}
        return part.replace(**{name: found[name] for name in fields}).with_extra(**extra)

    def _collect(
        self, policy: Any, rows: TokenRows, positions: Tensor, wants: frozenset[str], given: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """No-grad statistics of the rows ``positions`` as ``(B, T)`` float32 tensors (0 elsewhere), equal on every rank.

        given: (B,) numbers that statistics name as arguments.
        """
        found = {name: torch.zeros(_shape(rows)) for name in sorted(wants)}  # sets of names have another order on every rank
        self._collect_into(found, rows, positions, policy, given)
        return {name: self._sum(value).cpu() for name, value in found.items()}

    @torch.no_grad()
    def _collect_into(
        self,
        found: dict[str, Tensor],
        rows: TokenRows,
        positions: Tensor,
        policy: Any = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        """This rank's share of a no-grad pass, written into ``found`` (``(B, T)`` each) in place."""
        policy = policy or self.policy
        aligned = any(map(is_alignment, found))  # looks at whole rows
        set_mode(policy, training=False)
        for lines in self._micro_batches(rows, positions, self._shares(policy) and not aligned):
            _, micro = self._micro_batch(rows, positions, lines)
            numbers = {name: values[micro.rows.cpu()] for name, values in (given or {}).items()}
            statistics = policy(micro, temperature=self.temperature, wants=frozenset(found), chunk=self.settings.head_chunk, given=numbers)
            for name, values in found.items():
                values[micro.rows.cpu(), : micro.width] = statistics[name].float().cpu()

    def _reduced(self, shares: dict[str, Tensor]) -> dict[str, float]:
        """Shares of this rank to sums over all ranks: one collective, one transfer."""
        names = sorted(shares)
        stacked = torch.stack([shares[name].detach().float().to(self.device) for name in names])
        return dict(zip(names, self._sum(stacked).tolist(), strict=True))

    def _sum(self, value: Tensor) -> Tensor:
        """Over all ranks, on the learner's device."""
        with self._waiting("the other ranks", "to add their numbers"):
            return self.accelerator.reduce(value.to(self.device), "sum")


@dataclass(frozen=True)
class _OneUpdate:
    metrics: dict[str, float]
    idle_rows: int
    stepped: bool
    trained_rows: int
    trained_tokens: int


def _probe(config: Any) -> TokenRows:
    """A row for a first look at the model: one token, then as many as ``_PROBE_TOKENS`` and its context allow."""
    context, vocabulary = context_of(config), config.get_text_config().vocab_size
    count = _PROBE_TOKENS if context is None else max(min(_PROBE_TOKENS, context.tokens), 2)
    first, *others = ((7 * place + 3) % vocabulary for place in range(count))
    return TokenRows(((first,),), (tuple(others),))


def _lengths(rows: TokenRows, positions: Tensor) -> list[int]:
    """Tokens the model reads of each row."""
    return [len(rows.prompts[i]) + len(rows.completions[i]) for i in positions.tolist()]


def _shape(rows: TokenRows) -> tuple[int, int]:
    """(B, T)"""
    return len(rows), max(map(len, rows.completions))


def _wants(needs: frozenset[str]) -> frozenset[str]:
    """What the gradient pass must return, of everything a recipe's functions need; the rest stands in the batch."""
    own = {name for name in needs if name.partition(":")[0] in ("entropy", "entropy_grad", *STATISTICS)}
    return frozenset({"logp"} | own)


def _policy_tokens(statistics: dict[str, Tensor]) -> PolicyTokens:
    extra = {name: value for name, value in statistics.items() if name not in ("logp", "entropy")}
    return PolicyTokens(statistics["logp"], statistics.get("entropy"), extra)
