"""One step of each kind that every registered method takes part in, and what a real learner makes of it.

Names come from the registries, so that a new one is covered by itself. A policy case goes the way of
``train/online.py``: notes of the learner and its frozen models, advantages, controls, updates, controllers.
Learners have a learning rate of 0: their weights stay, and what they would have done is the gradient that
reaches the optimizer.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rltrain.advantage import ADVANTAGES
from rltrain.advantage.stage import compute_advantages
from rltrain.config.schema import Learner, LearnerCore, Model, Optimizer
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.control.stage import apply_control, split_by_timing
from rltrain.learner.frozen_models import frozen_model
from rltrain.learner.head import STATISTICS
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.learner.preference_learner import PreferenceLearner, lengths_of, pair_rows
from rltrain.learner.reward_learner import REWARDS
from rltrain.learner.row_scoring import LOG_PROBS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective, Term
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.terms.distill import MASS, reference_powers
from rltrain.registry import BoundMethod, MethodSpec, Registry
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.preference import CompletionFacts, LabelBatch, PairBatch
from rltrain.types.samples import SOURCE_NAMES, SOURCE_REFERENCE, SOURCE_TEMPERED

ROWS, GROUP, LONGEST = 8, 4, 8  # rows of a step, rows of a prompt, completion tokens
EXAMPLES = 9
SOURCE_CODES = {name: source for source, name in SOURCE_NAMES.items()} | {
    "aepo": SOURCE_TEMPERED
}  # of which a method asks for rows
# Hyperparameters with which a method has something to do on a step this small.
ENOUGH: dict[str, dict[str, Any]] = {
    "clip_cov": {"ratio": 0.1, "low": 0.0, "eps_low": 0.2, "eps_high": 0.2},
    "kl_cov": {"ratio": 0.1},
    "geometric_rejection": {"low": 0.97, "high": 1.03},
    "divergence_rejection": {"high": 0.011},
    "off_policy_mask": {"delta": -0.05},
    "high_entropy_tokens": {"share": 0.6},
    "reinforce_pp": {"kl_coef": 0.1},
    "aapo": {"reference": "mean"},  # "paired" is by the order of rows, by its definition
    "target_entropy": {"start": 0.1, "target": 10.0, "step": 0.1},
    "entropy_band": {"start": 0.05, "entropy_low": 0.0, "entropy_high": 0.1, "rate": 0.01, "low": 0.0},
    "annealed": {"start": 0.3, "slope": 0.1},
    "stage": {"end": 0.5},
    "epo_schedule": {"value": 0.2},
    "kl_target": {"start": 0.2, "every": 1, "rate": 0.5},
}
ENOUGH_OF_A_LOSS: dict[str, dict[str, Any]] = {
    "mmpo": {"gamma": 0.7},
    "bradley_terry_mmpo": {"gamma": 0.7},
    "rpo": {"sft_term": "token_mean"},
}


class Outcome(NamedTuple):
    gradient: Tensor  # of all weights, of one update after the other
    metrics: dict[str, float]


def apart(left: Tensor, right: Tensor) -> float:
    """Distance of two gradients in terms of the first."""
    return float((left - right).norm() / left.norm().clamp(min=1e-30))


# policy cases -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyCase:
    """terms: each with the name of its controller, None for a constant. advantage: None for given numbers."""

    loss: str = "clip"
    aggregate: str = "token_mean"
    terms: tuple[tuple[str, str | None], ...] = ()
    controls: tuple[str, ...] = ()
    advantage: str | None = None

    @property
    def advantages(self) -> BoundMethod | None:
        return None if self.advantage is None else bound(ADVANTAGES, self.advantage)

    @property
    def bound_controls(self) -> list[BoundMethod]:
        return [bound(TOKEN_CONTROLS, name) for name in self.controls]

    @property
    def specs(self) -> list[MethodSpec]:
        parts = [POLICY_LOSSES.spec(self.loss), *(TOKEN_CONTROLS.spec(name) for name in self.controls)]
        return [*parts, *([] if self.advantage is None else [ADVANTAGES.spec(self.advantage)])]

    @property
    def before(self) -> frozenset[str]:
        """What is needed before the first update."""
        needs = frozenset[str]().union(*(control.needs for control in self.bound_controls))
        return needs if self.advantages is None else needs | self.advantages.needs

    def objective(self) -> Objective:
        """With controllers in their first state."""
        return Objective(
            bound(POLICY_LOSSES, self.loss),
            tuple(term(*term_arguments) for term_arguments in self.terms),
            AGGREGATES.bind(self.aggregate),
        )


def literals(annotation: str) -> list[Any]:
    """The choices of "Literal[...]", none for any other annotation."""
    return list(ast.literal_eval(f"[{annotation[8:-1]}]")) if annotation.startswith("Literal[") else []


def variants(registry: Registry, enough: Mapping[str, Mapping[str, Any]]) -> list[BoundMethod]:
    """Every method with every choice of every ``Literal`` hyperparameter. enough: what else it is
    given, by name.
    """
    methods: list[BoundMethod] = []
    for name, spec in registry.specs.items():
        choices = {
            key: [choice for choice in literals(item.annotation) if choice != item.default]
            for key, item in spec.hyperparameters.items()
        }
        changes = [{}, *({key: value} for key, values in choices.items() for value in values)]
        methods += [registry.bind(name, {**enough.get(name, {}), **change}) for change in changes]
    return methods


def named(method: BoundMethod) -> str:
    return "-".join([method.name, *(f"{key}={value}" for key, value in method.hp.items())])


def bound(registry: Registry, name: str) -> BoundMethod:
    known = registry.spec(name).hyperparameters
    return registry.bind(name, {key: value for key, value in ENOUGH.get(name, {}).items() if key in known})


def term(name: str, controller: str | None) -> Term:
    if controller is None:
        return Term(name, LOSS_TERMS.bind(name), 0.3)
    method = bound(COEFFICIENTS, controller)
    made = method(**dict.fromkeys(method.spec.inputs, 2))  # of a run of two steps
    return Term(name, LOSS_TERMS.bind(name), made, made.inputs)


def promised(spec: MethodSpec, prefix: str) -> list[str]:
    """What a method's traits name behind "prefix:"."""
    return sorted(trait.partition(":")[2] for trait in spec.traits if trait.startswith(f"{prefix}:"))


def loss_cases() -> dict[str, PolicyCase]:
    """Every policy loss with the control that it is made for, and every aggregate with a loss per
    token and one per sequence.
    """
    cases = {}
    for name, spec in POLICY_LOSSES.specs.items():
        cases[f"loss {name}"] = PolicyCase(name, controls=tuple(promised(spec, "control")))
    for aggregate in AGGREGATES.names():
        cases |= {
            f"aggregate {aggregate} of {loss}": PolicyCase(loss, aggregate) for loss in ("clip", "gspo")
        }
    return cases


def term_cases() -> dict[str, PolicyCase]:
    """Every term, with a control that says where it acts if there is one."""
    cases = {}
    for name in LOSS_TERMS.names():
        mates = [
            control for control, spec in TOKEN_CONTROLS.specs.items() if f"loss_term:{name}" in spec.traits
        ]
        cases[f"term {name}"] = PolicyCase(terms=((name, None),), controls=tuple(mates[:1]))
    return cases


def control_cases() -> dict[str, PolicyCase]:
    """Every control, with the losses, terms and aggregate that it is made for."""
    cases = {}
    for name, spec in TOKEN_CONTROLS.specs.items():
        losses, aggregates = promised(spec, "policy_loss"), promised(spec, "aggregate")
        terms = tuple((term, None) for term in promised(spec, "loss_term"))
        cases[f"control {name}"] = PolicyCase(
            (losses or ["clip"])[0], (aggregates or ["token_mean"])[0], terms, (name,)
        )
    return cases


def advantage_cases() -> dict[str, PolicyCase]:
    """Every advantage, with the loss and aggregate that it is made for."""
    unrewarded = next(name for name, spec in POLICY_LOSSES.specs.items() if "reward_free" in spec.traits)
    cases = {}
    for name, spec in ADVANTAGES.specs.items():
        losses = promised(spec, "policy_loss") or [unrewarded if "reward_free" in spec.traits else "clip"]
        aggregates = promised(spec, "aggregate") or ["token_mean"]
        cases[f"advantage {name}"] = PolicyCase(losses[0], aggregates[0], advantage=name)
    return cases


def controller_cases() -> dict[str, PolicyCase]:
    """Every controller, with the term whose metric it watches or that takes what it tells."""
    cases = {}
    for name, spec in COEFFICIENTS.specs.items():
        watched = str(spec.hyperparameters["metric"].default) if "metric" in spec.hyperparameters else ""
        takers = [
            term
            for term, other in LOSS_TERMS.specs.items()
            if f"gives_{(other.inputs or ('nothing',))[0]}" in spec.traits
        ]
        watching = sorted(
            (term for term in LOSS_TERMS.names() if watched.startswith(f"loss/{term}")), key=len
        )
        cases[f"controller {name}"] = PolicyCase(terms=(((takers or watching or ["entropy"])[-1], name),))
    return cases


def every_policy_case() -> dict[str, PolicyCase]:
    return loss_cases() | term_cases() | control_cases() | advantage_cases() | controller_cases()


@dataclass(frozen=True)
class Step:
    """Two prompts of four rows.

    ``off`` stands between the policy that sampled, the one before the updates and the engine.
    """

    rows: TokenRows
    batch: TrainBatch
    off: Tensor  # (2, B, T)

    def ordered(self, order: Tensor) -> Step:
        return Step(self.rows.rows(order), self.batch.rows(order), self.off[:, order])


def step() -> Step:
    """Rows of 1 to 8 tokens; one row has no advantage, one is masked out, and so are tokens inside
    two others.
    """
    g = torch.Generator().manual_seed(7)
    row = torch.arange(ROWS)
    lengths = torch.randint(1, LONGEST + 1, (ROWS,), generator=g)
    lengths[2], lengths[5] = LONGEST, 1
    heads = [tuple(torch.randint(5, 60, (size,), generator=g).tolist()) for size in (9, 4)]
    completions = tuple(tuple(torch.randint(5, 60, (int(n),), generator=g).tolist()) for n in lengths)
    mask = torch.arange(LONGEST) < lengths[:, None]
    mask[2, 3] = mask[7, 0] = False
    mask[6] = False
    rewards = torch.tensor([1.0, 0.0, 0.2, 1.0, 0.6, 0.0, 0.3, 0.9])
    advantages = torch.randn(ROWS, 1, generator=g).masked_fill((row == 4)[:, None], 0.0)
    batch = TrainBatch(
        mask=mask,
        advantages=advantages.expand(mask.shape).contiguous(),
        weights=1 + 0.2 * torch.rand(mask.shape, generator=g),
        rewards=rewards,
        group=row // GROUP,
        source=row * 0,
        version=row * 0,
        sample=row % GROUP,
        correct=(rewards > 0.4).float(),
        answer=(row * 7) % 3 - 1,
        process_reward=0.3 * torch.randn(mask.shape, generator=g),
        step_id=(torch.arange(LONGEST) // 3).expand(mask.shape).masked_fill(~mask, -1),
        parts={"right": rewards, "short": ((row * 5) % 7 / 7).to(rewards.dtype)},
    )
    return Step(
        TokenRows(tuple(heads[place // GROUP] for place in range(ROWS)), completions),
        batch,
        torch.randn(2, *mask.shape, generator=g),
    )


class PolicySpread:
    """A learner, and an order of the step's rows. other: folder of the model that is reference and
    teacher.
    """

    def __init__(self, model: str, other: str, order: Tensor, **settings: Any) -> None:
        core = Learner(optimizer=Optimizer(lr=0.0, max_grad_norm=1e9), **settings)
        self.learner = PolicyLearner(
            Model(path=model), core, temperature=0.7, max_tokens=LONGEST, total_updates=1000, seed=0
        )
        for name in ("ref_logp", "teacher_logp"):
            self.learner.use_frozen(name, other, Model(path=model))
        self.step, self._gradients = step().ordered(order), caught(self.learner)
        self.statistics = self._statistics()

    def _statistics(self) -> dict[str, Tensor]:
        """Once for all cases: the weights stay."""
        cases = list(every_policy_case().values())
        before = frozenset[str]().union(*(case.before for case in cases))
        wants = {
            name for name in before if name.partition(":")[0] in STATISTICS and not name.endswith("_now")
        }
        wants |= {name for case in cases for name in case.objective().needs if name.startswith(MASS)}
        wants |= {"logp", "entropy", "ref_logp", "teacher_logp"}
        return self.learner.annotate(
            self.step.rows, frozenset(wants), reference_powers(frozenset(wants), self.step.batch)
        )

    def outcome(self, case: PolicyCase) -> Outcome:
        """Two updates where controls look at the policy at the start of each; two steps where a
        controller moves between them.
        """
        objective, self._gradients[:] = case.objective(), []
        rows, batch = self._weighed(case, objective)
        _, later = split_by_timing(case.bound_controls)
        self.learner.settings = self.learner.settings.model_copy(
            update={"updates": 2 if later is not None else 1}
        )
        self.learner.trained.version = 0  # it seeds which prompts each update takes
        metrics: dict[str, float] = dict(batch.notes)
        controllers: list[Any] = [term.coefficient for term in objective.terms if callable(term.coefficient)]
        for number in range(1 + bool(controllers)):
            told = [{"coefficient": controller(), **controller.inputs()} for controller in controllers]
            metrics |= {
                f"{name} of step {number}": value for inputs in told for name, value in inputs.items()
            }
            update = self.learner.update(rows, batch, objective, later)
            metrics |= {f"{name} of step {number}": value for name, value in update.metrics.items()}
            for controller in controllers:
                controller.observe(
                    update.metrics | {"learner/entropy_mean": float(update.entropy[batch.mask].mean())}
                )
        return Outcome(torch.cat(self._gradients), metrics)

    def _weighed(self, case: PolicyCase, objective: Objective) -> tuple[TokenRows, TrainBatch]:
        """The step with what the case needs in ``extra``, rows of the sources that it asks for,
        advantages and controls.
        """
        rows, batch, statistics = self.step.rows, self.step.batch, self.statistics
        old = statistics["logp"] + 0.3 * self.step.off[0]
        needs = case.before | objective.needs
        batch = batch.replace(
            old_logp=old, rollout_logp=old + 0.1 * self.step.off[1], old_entropy=statistics["entropy"]
        )
        batch = batch.replace(ref_logp=statistics["ref_logp"], teacher_logp=statistics["teacher_logp"])
        batch = batch.with_extra(
            **{name: statistics[name] for name in needs if ":" in name and name in statistics}
        )
        for source in (SOURCE_CODES[name] for spec in case.specs for name in promised(spec, "extra_samples")):
            batch = batch.replace(source=torch.where(batch.sample >= GROUP // 2, source, batch.source))
        if case.advantages is not None:
            batch = compute_advantages(batch, case.advantages)
        for control in split_by_timing(case.bound_controls)[0]:
            batch = apply_control(batch, control)
        kept = torch.nonzero(batch.source != SOURCE_REFERENCE).flatten()
        rows = rows.rows(kept)
        return rows, batch.rows(kept, max(map(len, rows.completions)))


def caught(learner: Any) -> list[Tensor]:
    """Filled with the gradient of each update from now on, before it is clipped: the whole one, on
    every rank.
    """
    gradients: list[Tensor] = []
    step = learner.trained.backend.step

    def keep() -> tuple[float, bool]:
        gradients.append(
            torch.cat(
                [whole_gradient(weight).flatten() for weight in learner.trained.unwrapped_model.parameters()]
            )
        )
        return step()

    learner.trained.backend.step = keep
    return gradients


def whole_gradient(weight: Any) -> Tensor:
    """A copy of what all ranks together hold, however their backend spreads it. A collective."""
    if hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):  # ZeRO-3, ZeRO-2
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(weight)
        assert gradient is not None, "ZeRO has no gradient of a weight that it trains"
        return gradient.clone()
    return weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad.clone()


# preference cases -------------------------------------------------------------------------------------------


def preference_cases() -> list[str]:
    return PREFERENCE_LOSSES.names()


class PreferenceSpread:
    """Learners of policies and of scalar heads, and an order of the examples. other: folder of the
    reference.
    """

    def __init__(self, model: str, other: str, order: Tensor, **settings: Any) -> None:
        core = LearnerCore(optimizer=Optimizer(lr=0.0, max_grad_norm=1e9), **settings)
        self.learners = [
            PreferenceLearner(Model(path=model), core, total_updates=1000, seed=0, scoring=scoring)
            for scoring in (LOG_PROBS, REWARDS)
        ]
        self._gradients = [caught(learner) for learner in self.learners]
        self.order, self._model, self._other = order, model, other
        self._facts: dict[TokenRows, Tensor] = {}

    def outcome(self, name: str) -> Outcome:
        spec = PREFERENCE_LOSSES.spec(name)
        kind = "scalar_head" in spec.traits
        learner, gradients = self.learners[kind], self._gradients[kind]
        gradients.clear()
        objective = PreferenceObjective(PREFERENCE_LOSSES.bind(name, ENOUGH_OF_A_LOSS.get(name, {})))
        arguments = self.pairs() if "pairs" in spec.traits else self.labels()
        update = learner.update_examples(*arguments[:2], objective, *arguments[2:])
        return Outcome(torch.cat(gradients), update.metrics)

    def pairs(self) -> tuple[TokenRows, PairBatch]:
        """Nine pairs of six prompts with completions of 1 to 8 tokens."""
        prompts, g = _texts(EXAMPLES, 5, 12, seed=1), torch.Generator().manual_seed(2)
        prompts = (*prompts[:6], *prompts[:3])
        rows = pair_rows(prompts, *(_texts(EXAMPLES, 1, LONGEST, seed=seed) for seed in (3, 4)))
        margin, columns = (
            torch.rand(EXAMPLES, generator=g),
            {"is_target_language": (torch.arange(EXAMPLES) % 2).float()},
        )
        rows = rows.rows(torch.cat([self.order, self.order + EXAMPLES]))
        facts = self._facts_of(rows, sides=2)
        chosen, rejected = (
            facts.rows(torch.arange(EXAMPLES)),
            facts.rows(torch.arange(EXAMPLES, 2 * EXAMPLES)),
        )
        prompt, weight = torch.arange(EXAMPLES) % 6, 0.5 + torch.rand(EXAMPLES, generator=g)
        more: dict[str, Any] = {"margin": margin, "p_chosen": torch.sigmoid(3 * margin - 1), "weight": weight}
        more = {name: value[self.order] for name, value in more.items()}
        columns = {name: value[self.order] for name, value in columns.items()}
        return rows, PairBatch(chosen, rejected, prompt[self.order], columns=columns, **more)

    def labels(self) -> tuple[TokenRows, LabelBatch, TokenRows]:
        """Three completions for each of three prompts, and each prompt with another's completion."""
        heads, texts = _texts(3, 5, 12, seed=5), _texts(EXAMPLES, 1, LONGEST, seed=6)
        prompts = tuple(heads[place // 3] for place in range(EXAMPLES))
        rows = TokenRows(prompts, texts).rows(self.order)
        others = TokenRows(prompts, (*texts[3:], *texts[:3])).rows(self.order)
        label, rate = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 1, 0]), torch.linspace(0.05, 0.9, EXAMPLES)
        weight = 0.5 + torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(8))
        batch = LabelBatch(
            self._facts_of(rows, sides=1),
            (torch.arange(EXAMPLES) // 3)[self.order],
            label=label[self.order],
            mismatched=self._facts_of(others, sides=1),
            weight=weight[self.order],
            columns={"pass_rate": rate[self.order]},
        )
        return rows, batch, others

    def _facts_of(self, rows: TokenRows, *, sides: int) -> CompletionFacts:
        """With log-probs of the reference, and of a previous iterate between it and the policy."""
        if rows not in self._facts:
            learner = self.learners[0]
            with frozen_model(self._other, Model(path=self._model), learner.trained) as (frozen, _):
                self._facts[rows] = learner.log_probs(rows, sides=sides, frozen=frozen)
        lengths, reference = lengths_of(rows), self._facts[rows]
        return CompletionFacts(lengths, ref_logp=reference, previous_logp=reference + 0.1 * lengths)


def _texts(count: int, shortest: int, longest: int, *, seed: int) -> tuple[tuple[int, ...], ...]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g)
    return tuple(tuple(torch.randint(5, 60, (int(n),), generator=g).tolist()) for n in lengths)
