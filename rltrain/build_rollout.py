"""What samples and grades: engine, order of prompts, arms, producer, evaluator. An engine's adapter is imported when a recipe names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from rltrain.build_environment import build_dialogue, build_pool
from rltrain.build_materials import REWARD_MODEL, Materials
from rltrain.config.check import ARMS, ORDERS, REWARDS
from rltrain.config.schema import AdaptiveTemperature, Recipe
from rltrain.data.gain_rl import template_lengths
from rltrain.data.language import Language
from rltrain.data.order import Order
from rltrain.errors import user_mistakes
from rltrain.learner.accelerate_learner import AccelerateLearner, load_causal_lm
from rltrain.learner.frozen import reference_weights
from rltrain.learner.reward_model import RewardModel
from rltrain.protocols import RolloutEngine
from rltrain.rollout.arms import Arm, Means
from rltrain.rollout.environment import EpisodeEngine
from rltrain.rollout.model_rewards import ModelGrader
from rltrain.rollout.producer import Grader, Producer, within
from rltrain.rollout.temperature import TemperatureController
from rltrain.rollout.verdicts import label_of_only_function
from rltrain.rollout.watched import WatchedEngine
from rltrain.seeds import stable_hash
from rltrain.sync.in_process import Sync
from rltrain.train.evaluate import Evaluator
from rltrain.train.mismatch import MismatchGuard
from rltrain.types import REFERENCE_VERSION, Prompt, Sampling, TokenRows
from rltrain.watchdog import Waiting
from rltrain.weight_names import CheckpointNames

# Mean absolute difference in nats between engine and learner at which a run warns and stops. In float32 engines agree to about 1e-6
# and never above 1e-5; bfloat16 kernels of two libraries to about 0.01.
MISMATCH_FLOAT32 = (1e-4, 1e-3)
MISMATCH_BFLOAT16 = (0.05, 0.2)


@dataclass(frozen=True)
class Rollout:
    """What samples, grades and evaluates in a run, and how the learner's weights get there."""

    engine: RolloutEngine
    sync: Sync
    producer: Producer
    evaluator: Evaluator | None
    mismatch: MismatchGuard


def build_rollout(recipe: Recipe, materials: Materials, learner: AccelerateLearner, waiting: Waiting, *, fresh: bool) -> Rollout:
    """The engine starts here. fresh: the run is at its start, and no saved state will replace what the order of prompts measures."""
    order = build_order(recipe, materials.train.prompts, learner, fresh=fresh)
    with waiting(f"the {recipe.rollout.engine} engine", "to start"):
        engine = WatchedEngine(build_engine(recipe, materials.language, learner.device), recipe.rollout.engine, waiting)
    sync, grader = build_sync(recipe, engine, learner), graded_by_models(recipe, materials.grader, learner.device)
    return Rollout(
        engine=engine,
        sync=sync,
        producer=build_producer(recipe, materials, engine, learner, sync, order, grader),
        evaluator=None if materials.held_out is None else build_evaluator(recipe, materials, grader, learner),
        mismatch=build_guard(recipe, engine, learner),
    )


def build_engine(recipe: Recipe, language: Language, device: torch.device) -> RolloutEngine:
    """The rollout engine a recipe names, without weights yet. In an environment its completions are episodes."""
    engine, ref = single_turn_engine(recipe, language, device), recipe.rollout.environment
    if ref is None:
        return engine
    return EpisodeEngine(
        engine,
        build_pool(ref),
        build_dialogue(recipe, ref, language),
        decode=language.decode,
        filler=language.endings.pad,
        max_turns=ref.max_turns,
        turn_tokens=ref.turn_tokens,
    )


def single_turn_engine(recipe: Recipe, language: Language, device: torch.device) -> RolloutEngine:
    """The engine itself."""
    model, rollout = recipe.model, recipe.rollout
    dtype = torch.float32 if device.type == "cpu" or recipe.learner.precision == "float32" else torch.bfloat16
    match rollout.engine:
        case "transformers":
            from rltrain.rollout.transformers_engine import TransformersEngine

            return TransformersEngine(
                model.path,
                revision=model.revision,
                stop_token_ids=language.endings.stop,
                pad_token_id=language.endings.pad,
                decode=language.decode,
                max_rows=rollout.max_rows,
                device=device,
                dtype=dtype,
                attention="auto" if model.attention == "flash_attention_2" else model.attention,
            )
        case "vllm":
            from rltrain.rollout.vllm_colocated import VllmColocated

            return VllmColocated(
                model.path,
                revision=model.revision,
                stop_token_ids=language.endings.stop,
                decode=language.decode,
                max_model_len=recipe.data.max_prompt_tokens + rollout.max_tokens,
                max_num_seqs=rollout.vllm.max_num_seqs,
                kv_cache_gib=rollout.vllm.kv_cache_gib,
                gpu_memory_utilization=rollout.vllm.gpu_memory_utilization,
                dtype=dtype,
                enforce_eager=rollout.vllm.enforce_eager,
                adaptive_temperature=rollout.adaptive_temperature is not None,
            )


def load_from_disk(engine: RolloutEngine, recipe: Recipe) -> Sync:
    """The weights of ``model.path`` as version 0, through the same door as a learner's: every one of them compared.

    Raises WeightMismatchError where one did not arrive. The answer's ``verify`` says whether they are still there.
    """
    loaded = load_causal_lm(recipe.model.path, recipe.model.revision, "auto")
    names = CheckpointNames(loaded)
    sync = _sync(recipe, engine, names)
    sync.push(names.to_checkpoint(loaded.state_dict().items()), 0, expect_change=False)
    return sync


def build_sync(recipe: Recipe, engine: RolloutEngine, learner: AccelerateLearner) -> Sync:
    return _sync(recipe, engine, learner.names)


def _sync(recipe: Recipe, engine: RolloutEngine, names: CheckpointNames) -> Sync:
    return Sync(engine, names.ties, recipe.sync.sample, recipe.sync.full_every, stable_hash(recipe.seed, "sync"))


def build_guard(recipe: Recipe, engine: RolloutEngine, learner: AccelerateLearner) -> MismatchGuard:
    """The recipe's thresholds, or those of the lower of both precisions: a bfloat16 learner rounds beside a float32 engine too."""
    rollout = recipe.rollout
    exact = engine.dtype == torch.float32 and learner.accelerator.mixed_precision == "no"
    warn, stop = MISMATCH_FLOAT32 if exact else MISMATCH_BFLOAT16
    return MismatchGuard(rollout.mismatch_warn or warn, rollout.mismatch_stop or stop, rollout.mismatch_patience)


def build_order(recipe: Recipe, prompts: Sequence[Prompt], learner: AccelerateLearner, *, fresh: bool) -> Order:
    """Which prompts each step trains on. fresh: no saved state will replace what is measured here, on the model as it starts."""
    bound, seed = ORDERS.bind(recipe.data.order.name, recipe.data.order.hp), stable_hash(recipe.seed, "order")
    size = (len(prompts), recipe.rollout.prompts, seed)
    with user_mistakes():
        if "alignment" not in bound.needs:
            return bound(*size)
        if not fresh:
            return bound(*size, [])
        values = {name: one.default for name, one in bound.spec.hyperparameters.items()} | dict(bound.hp)
        ids = [prompt.token_ids for prompt in prompts]
        name = ":".join(map(str, ("alignment", *template_lengths(ids), values["inter_weight"])))
        rows = TokenRows(tuple(ids), tuple(one[-1:] for one in ids))  # a completion's last token is not read
        return bound(*size, learner.annotate(rows, frozenset({name}))[name][:, 0].tolist())


def graded_by_models(recipe: Recipe, pool: Grader, device: torch.device) -> Grader:
    """The pool's rewards and those of the reward models that the recipe names, which are loaded here."""
    refs = [ref for ref in recipe.reward.functions if ref.name == REWARD_MODEL]
    if not refs:
        return pool
    tokens = recipe.learner.tokens_per_micro_batch
    load = partial(RewardModel, device=device, tokens_per_micro_batch=tokens, date=recipe.data.date)
    models = [(ref.name, ref.weight, REWARDS.bind(ref.name, ref.hp)(load)) for ref in refs]
    return ModelGrader(None if len(refs) == len(recipe.reward.functions) else pool, models)


def build_producer(
    recipe: Recipe,
    materials: Materials,
    engine: RolloutEngine,
    learner: AccelerateLearner,
    sync: Sync,
    order: Order,
    grader: Grader,
) -> Producer:
    rollout, prompts = recipe.rollout, materials.train.prompts
    sampling_rule = rollout.dynamic_sampling
    sampling = Sampling(n=rollout.n, temperature=rollout.temperature, max_tokens=rollout.max_tokens, seed=recipe.seed)
    return Producer(
        engine=engine,
        grader=grader,
        order=order,
        prompts=prompts,
        sampling=sampling,
        wanted=rollout.prompts,
        max_rounds=1 if sampling_rule is None else sampling_rule.max_rounds,
        keep=None if sampling_rule is None or sampling_rule.accuracy is None else partial(within, *sampling_rule.accuracy),
        rank=learner.rank,
        ranks=learner.ranks,
        gather=learner.gather_objects,
        arms=build_arms(recipe, materials, engine, learner, sync, sampling),
        temperature=build_temperature(rollout.adaptive_temperature),
        verdict_of=label_of_only_function(recipe.reward.functions),
    )


def build_temperature(settings: AdaptiveTemperature | None) -> TemperatureController | None:
    return None if settings is None else TemperatureController(tau=settings.tau, variant=settings.variant, rho=settings.rho)


def build_arms(
    recipe: Recipe, materials: Materials, engine: RolloutEngine, learner: AccelerateLearner, sync: Sync, sampling: Sampling
) -> tuple[Arm, ...]:
    """The recipe's arms. The reference model is loaded if one of them samples from it."""
    refs, language = recipe.rollout.arms, materials.language
    reference: Callable[[], AbstractContextManager[None]] = nullcontext
    if any(ref.name == "reference" for ref in refs):
        weights = reference_weights(recipe.model, learner.model, engine.dtype)
        reference = partial(sync.lend, weights, REFERENCE_VERSION, learner.weights)
    means = Means(engine, sampling, materials.train.prompts, reference, language.encode_answer)
    with user_mistakes():
        return tuple(ARMS.bind(ref.name, ref.hp)(means) for ref in refs)


def build_evaluator(recipe: Recipe, materials: Materials, grader: Grader, learner: AccelerateLearner | None = None) -> Evaluator:
    """Over the held-out prompts; alone, or with the ranks of ``learner``. grader: of ``graded_by_models``."""
    assert materials.held_out is not None
    settings = recipe.eval
    ranks = {} if learner is None else {"rank": learner.rank, "ranks": learner.ranks, "gather": learner.gather_objects}
    sampling = Sampling(
        n=settings.n, temperature=settings.temperature, max_tokens=recipe.rollout.max_tokens, seed=stable_hash(recipe.seed, "eval")
    )
    verdict_of = label_of_only_function(recipe.reward.functions)
    return Evaluator(materials.held_out.prompts, grader, sampling, settings.k, verdict_of=verdict_of, **ranks)
