"""Builds the parts of a run that sample, grade and evaluate, and the transfer of weights to them."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from rltrain.build.context import RunContext
from rltrain.build.engines import build_engine, build_sampler, engine_base
from rltrain.build.inputs import REWARD_MODEL, RunInputs
from rltrain.build.schedule import WeightsDigest, add_bound, add_journal
from rltrain.config.rules.registries import EXTRA_SAMPLES, ORDERS, REWARDS
from rltrain.config.schema import (
    AdaptiveTemperature,
    Data,
    DynamicSampling,
    Eval,
    MethodRef,
    Model,
    RewardStage,
    Rollout,
    SampledRecipe,
    TokenChoice,
)
from rltrain.config.schema import Sync as SyncSettings
from rltrain.data.gain_rl import template_lengths
from rltrain.data.tokenization import Tokenization
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.frozen_models import reference_weights
from rltrain.learner.loading import load_causal_lm
from rltrain.learner.pair_learner import PairLearner
from rltrain.learner.passes import token_log_probs
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.learner.reward_model import RewardModel
from rltrain.learner.trained_model import ModelOwner
from rltrain.needs import ALIGNMENT, REFERENCE_WEIGHTS
from rltrain.process import Process
from rltrain.protocols import RolloutEngine
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler, Order
from rltrain.rollout.extra_samples import SamplerContext, SampleSource
from rltrain.rollout.grading import Grader, is_in_accuracy_range
from rltrain.rollout.model_rewards import ModelGrader
from rltrain.rollout.source import PromptedSource
from rltrain.rollout.temperature import TemperatureController
from rltrain.rollout.verdicts import label_of_only_function
from rltrain.seeds import stable_hash
from rltrain.sync.adapter import AdapterSync, AdapterTarget, Probe
from rltrain.sync.colocated import Sync
from rltrain.train.evaluate import Evaluator
from rltrain.train.mismatch import MismatchGuard
from rltrain.train.replayed import NoPush
from rltrain.types.policy import TokenRows
from rltrain.types.samples import REFERENCE_VERSION, Prompt, Sampling, ScoredGroup, Truncation
from rltrain.watchdog import Deadline
from rltrain.weight_names import CheckpointNames

# Mean absolute log-prob difference (nats) between engine and learner at which a run warns, and stops.
# In float32 they differ by about 1e-6 and never above 1e-5; bfloat16 kernels of two libraries by about 0.01.
MISMATCH_FLOAT32 = (1e-4, 1e-3)
MISMATCH_BFLOAT16 = (0.05, 0.2)

SamplingLearner = PolicyLearner | PairLearner  # the learners of runs that sample


@dataclass(frozen=True)
class RolloutParts:
    """The parts of a run that sample, grade and evaluate, and the transfer of weights to them."""

    source: PromptedSource
    sync: Sync | AdapterSync | NoPush
    evaluator: Evaluator | None
    mismatch: MismatchGuard


def build_rollout(
    inputs: RunInputs,
    learner: SamplingLearner,
    context: RunContext,
    recipe: SampledRecipe,
    rollout: Rollout,
) -> RolloutParts:
    """Starts the engine; in a replay there is none. rollout: the recipe's, with what is left open decided."""
    if context.replayed is not None:
        return cast("RolloutParts", context.replayed(learner))
    build = _build_here
    if learner.trained.adapter is None and is_controlled(rollout, recipe.reward, recipe.data):
        from rltrain.build.controller import build_controlled

        build = build_controlled
    return build(inputs, learner, context, recipe, rollout)


def _build_here(
    inputs: RunInputs,
    learner: SamplingLearner,
    context: RunContext,
    recipe: SampledRecipe,
    rollout: Rollout,
) -> RolloutParts:
    """The parts where this process samples and grades."""
    process = context.process
    data = recipe.data
    reward = recipe.reward
    seed = recipe.seed
    inputs.grader.log_to(context.folder.rewards_log(process.rank))
    prompts = inputs.train.prompts
    precision = learner.trained.settings.precision
    order = build_order(data.order, prompts, rollout.prompts, seed, learner, fresh=context.is_fresh)
    with (
        engine_base(recipe.model, rollout, learner.trained, process) as base,
        process.deadline(f"the {rollout.engine} engine", "to start"),
    ):
        truncation = recipe.eval.truncates
        engine = build_engine(
            base, data, rollout, precision, inputs.tokenization, process, truncation=truncation
        )
    sampler = build_sampler(data, rollout, engine, inputs.tokenization)
    longest = data.max_prompt_tokens + rollout.max_tokens
    sync = build_learner_sync(recipe.sync, engine, learner, longest, seed, process.deadline)
    batch_tokens = learner.trained.settings.tokens_per_micro_batch
    grader = add_model_rewards(reward, inputs.grader, batch_tokens, process.device, data.date)

    sampling = make_sampling(rollout, seed)
    reference = build_reference(
        recipe.model, data, rollout, learner, inputs.tokenization, process, recipe.sync
    )
    load_reference = _reference_loader(rollout.extra_samples, recipe.model, engine, learner, sync, reference)
    encode = inputs.tokenization.encode_answer
    verdict_of = label_of_only_function(reward.functions)
    sampler_context = SamplerContext(
        sampler, sampling, prompts, load_reference, encode, process.deadline, reference
    )
    source = build_source(
        rollout,
        GradedSampler(sampler, grader, process, verdict_of),
        order,
        sampler_context,
        sync,
        partial(close_all, [engine] if reference is None else [engine, reference]),
    )
    digest = WeightsDigest(learner)
    source = add_bound(source, engine, rollout, recipe.train.steps, context, digest)
    source = add_journal(source, recipe.journal, context, digest, inputs.held_out)
    evaluator = None
    if inputs.held_out is not None:
        evaluator = build_evaluator(recipe.eval, reward, rollout.max_tokens, seed, inputs.held_out.prompts)
    guard = build_guard(rollout, engine.dtype, learner.trained.precision)
    return RolloutParts(source, sync, evaluator, guard)


def is_controlled(rollout: Rollout, reward: RewardStage, data: Data) -> bool:
    """Whether a process of its own draws, samples and grades: where workers sample, and nothing of it takes
    the learner's model or device. Under a bound a thread of this process takes what arrives.
    """
    needs = [EXTRA_SAMPLES.spec(ref.name).needs_with(ref.hp) for ref in rollout.extra_samples]
    return (
        rollout.engine == "vllm_server"
        and rollout.workers is not None
        and rollout.bound is None
        and not any(REFERENCE_WEIGHTS in each for each in needs)
        and not any(ref.name == REWARD_MODEL for ref in reward.functions)
        and ALIGNMENT not in ORDERS.spec(data.order.name).needs
    )


def build_reference(
    model: Model,
    data: Data,
    rollout: Rollout,
    learner: SamplingLearner,
    tokenization: Tokenization,
    process: Process,
    settings: SyncSettings,
) -> RolloutEngine | None:
    """The engine on ``rollout.reference_workers``, which hold the frozen reference model, proved; one that
    comes back is sent it again. Without such workers None.
    """
    if rollout.reference_workers is None:
        return None
    model = model.model_copy(update={"adapter": None})  # they hold whole weights, which are pushed
    apart = rollout.model_copy(update={"workers": rollout.reference_workers})
    with process.deadline("the reference's workers", "to start"):
        engine = build_engine(model, data, apart, learner.trained.settings.precision, tokenization, process)
    try:
        weights = reference_weights(model, learner.trained, engine.dtype)
        sync = build_sync(settings, engine, learner.names, 0, process.deadline)
        sync.push(lambda dtype: weights.items(), REFERENCE_VERSION, expect_change=False)
    except BaseException:
        engine.close()
        raise
    return engine


def close_all(engines: Sequence[RolloutEngine]) -> None:
    for engine in engines:
        engine.close()


def build_source(
    rollout: Rollout,
    graded: GradedSampler,
    order: Order,
    context: SamplerContext,
    sync: Sync | AdapterSync,
    close_engine: Callable[[], None],
) -> ColocatedRollouts:
    """The object that samples and grades the rollouts of every step."""
    dynamic = rollout.dynamic_sampling
    return ColocatedRollouts(
        graded=graded,
        order=order,
        prompts=context.prompts,
        sampling=context.sampling,
        groups_per_step=rollout.prompts,
        max_rounds=1 if dynamic is None else dynamic.max_rounds,
        verify=sync.verify,
        put_to_sleep=sync.sleep,
        close_engine=close_engine,
        sources=build_extra_samples(rollout.extra_samples, context),
        keep=_accuracy_filter(dynamic),
        temperature=build_temperature(rollout.adaptive_temperature),
    )


def _accuracy_filter(dynamic: DynamicSampling | None) -> Callable[[ScoredGroup], bool] | None:
    if dynamic is None or dynamic.accuracy is None:
        return None
    return partial(is_in_accuracy_range, *dynamic.accuracy)


def build_sync(
    settings: SyncSettings, engine: RolloutEngine, names: CheckpointNames, seed: int, deadline: Deadline
) -> Sync:
    """names: of the weights that are pushed. A server says all fingerprints at once, so that all of its
    weights are compared at every push.
    """
    full_every = 1 if engine.name == "vllm_server" else settings.full_every
    return Sync([engine], names.ties, settings.sample, full_every, stable_hash(seed, "sync"), deadline)


def build_learner_sync(
    settings: SyncSettings,
    engine: RolloutEngine,
    learner: SamplingLearner,
    longest: int,
    seed: int,
    deadline: Deadline,
) -> Sync | AdapterSync:
    """vLLM takes an adapter beside its own copy of the base, in this process and on servers; the embedded
    engine takes the merged weights.

    longest: tokens of a row that fits the engine.
    """
    adapter = learner.trained.adapter
    if adapter is None or engine.name == "transformers":
        sync = build_sync(settings, engine, learner.names, seed, deadline)
        if adapter is None and learner.world_size > 1 and learner.names.are_blocks:
            sync.shard_sums = learner.weight_fingerprints
        return sync
    is_float32 = engine.dtype == torch.float32 and learner.trained.precision == "no"
    row = learner.trained.probe_row
    row = TokenRows(row.prompts, (row.completions[0][: longest - 2],))  # vLLM adds a token
    tolerance, _ = MISMATCH_FLOAT32 if is_float32 else MISMATCH_BFLOAT16

    def log_probs() -> list[float]:
        return token_log_probs(learner.trained, row, temperature=1.0)[0].tolist()

    probe = Probe((*row.prompts[0], *row.completions[0]), log_probs, tolerance)
    return AdapterSync(
        [cast("AdapterTarget", engine)],
        learner.trained.base_weights,
        learner.names.ties,
        learner.trained.adapter_config(),
        adapter.settings.scale,
        probe,
        settings.full_every,
        deadline,
    )


def load_from_disk(
    engine: RolloutEngine, model: Model, settings: SyncSettings, seed: int, deadline: Deadline
) -> Sync:
    """Loads the weights of ``model.path`` into the engine as version 0, in the same way as a learner's, and
    compares every one.

    Raises WeightMismatchError if a weight did not arrive. ``verify`` of the result checks later whether the
    weights are still there.
    """
    loaded = load_causal_lm(model.path, model.revision, "auto")
    names = CheckpointNames(loaded)
    sync = build_sync(settings, engine, names, seed, deadline)
    sync.push(lambda dtype: names.to_checkpoint(loaded.state_dict().items()), 0, expect_change=False)
    return sync


def build_guard(rollout: Rollout, dtype: torch.dtype, precision: str) -> MismatchGuard:
    """The recipe's thresholds, or the defaults for the lower precision of engine and learner.

    dtype: of the engine's weights. precision: of the learner's autocast, "no" for float32.
    """
    is_float32 = dtype == torch.float32 and precision == "no"
    warn, stop = MISMATCH_FLOAT32 if is_float32 else MISMATCH_BFLOAT16
    return MismatchGuard(
        rollout.mismatch_warn or warn, rollout.mismatch_stop or stop, rollout.mismatch_patience
    )


def build_order(
    ref: MethodRef,
    prompts: Sequence[Prompt],
    per_step: int,
    seed: int,
    learner: SamplingLearner,
    *,
    fresh: bool,
) -> Order:
    """Which prompts each step trains on.

    fresh: no saved state will replace what is measured here, on the starting model.
    """
    bound = ORDERS.bind(ref.name, ref.hp)
    arguments = (len(prompts), per_step, stable_hash(seed, "order"))
    with user_mistakes():
        if ALIGNMENT not in bound.needs:
            return bound(*arguments)
        if not fresh:
            return bound(*arguments, [])

        values = {name: item.default for name, item in bound.spec.hyperparameters.items()} | dict(bound.hp)
        ids = [prompt.token_ids for prompt in prompts]
        statistic = ":".join(map(str, ("alignment", *template_lengths(ids), values["inter_weight"])))
        # the model does not read a completion's last token
        rows = TokenRows(tuple(ids), tuple(tokens[-1:] for tokens in ids))
        alignment = learner.annotate(rows, frozenset({statistic}))[statistic]
        return bound(*arguments, alignment[:, 0].tolist())


def add_model_rewards(
    stage: RewardStage, pool: Grader, tokens_per_micro_batch: int, device: torch.device, date: dt.date | None
) -> Grader:
    """The pool's rewards and those of the recipe's reward models, which this function loads."""
    refs = [ref for ref in stage.functions if ref.name == REWARD_MODEL]
    if not refs:
        return pool
    load = partial(RewardModel, device=device, tokens_per_micro_batch=tokens_per_micro_batch, date=date)
    models = [(ref.name, ref.weight, REWARDS.bind(ref.name, ref.hp)(load)) for ref in refs]
    return ModelGrader(None if len(refs) == len(stage.functions) else pool, models)


def build_temperature(settings: AdaptiveTemperature | None) -> TemperatureController | None:
    if settings is None:
        return None
    return TemperatureController(tau=settings.tau, variant=settings.variant, rho=settings.rho)


def build_extra_samples(refs: Sequence[MethodRef], context: SamplerContext) -> tuple[SampleSource, ...]:
    """The recipe's sources of extra rows."""
    with user_mistakes():
        return tuple(EXTRA_SAMPLES.bind(ref.name, ref.hp)(context) for ref in refs)


def _reference_loader(
    refs: Sequence[MethodRef],
    model: Model,
    engine: RolloutEngine,
    learner: ModelOwner,
    sync: Sync | AdapterSync,
    others: RolloutEngine | None,
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the engine has the reference model's weights, if a source needs them. others: the
    engine that has them always.
    """
    if others is not None:
        return nullcontext
    if not any(REFERENCE_WEIGHTS in EXTRA_SAMPLES.spec(ref.name).needs_with(ref.hp) for ref in refs):
        return _refuse_reference
    if isinstance(sync, AdapterSync):
        if model.reference is not None:
            raise UserError(
                "rollout.extra_samples reference: with model.adapter, vLLM holds the base and its adapters, "
                f"not model.reference {model.reference}; leave model.reference out, or set rollout.engine to "
                "transformers"
            )
        return partial(sync.switch_off, REFERENCE_VERSION, learner.adapter_weights)
    weights = reference_weights(model, learner.trained, engine.dtype)
    return partial(sync.load_temporarily, weights, REFERENCE_VERSION, learner.weights)


def _refuse_reference() -> AbstractContextManager[None]:
    raise UserError(
        "a source of rollout.extra_samples asks for the reference model, which is not loaded; declare "
        'needs={"reference_weights"} above it'
    )


def build_evaluator(
    settings: Eval,
    stage: RewardStage,
    max_tokens: int,
    seed: int,
    prompts: Sequence[Prompt],
    versions: frozenset[int] | None = None,
) -> Evaluator:
    """The evaluator over the held-out prompts. versions: see ``Evaluator``."""
    sampling = with_token_choice(
        Sampling(
            n=settings.n,
            temperature=settings.temperature,
            max_tokens=max_tokens,
            seed=stable_hash(seed, "eval"),
        ),
        settings,
    )
    verdict_of = label_of_only_function(stage.functions)
    return Evaluator(prompts, sampling, settings.k, verdict_of, versions)


def make_sampling(rollout: Rollout, seed: int) -> Sampling:
    """The policy's own, with the run's seed."""
    sampling = with_token_choice(
        Sampling(n=rollout.n, temperature=rollout.temperature, max_tokens=rollout.max_tokens, seed=seed),
        rollout,
    )
    return dataclasses.replace(sampling, returns_kept=rollout.truncates)


def with_token_choice(sampling: Sampling, settings: TokenChoice) -> Sampling:
    """``sampling`` with the tokens that may be drawn and the texts that end a completion."""
    return dataclasses.replace(
        sampling,
        truncation=Truncation(settings.min_p, settings.top_h, settings.top_k, settings.top_p),
        repetition_penalty=settings.repetition_penalty,
        stop=settings.stop,
    )
