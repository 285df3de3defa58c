"""Builds the run of a recipe that learns from judged completions.

Data are checked first and weights are loaded last, as in ``build/online.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch

from rltrain.build.context import RunContext
from rltrain.build.engines import build_transformers_engine
from rltrain.build.frozen_examples import all_at_once, annotate_examples, examples_in
from rltrain.build.outputs import (
    QUIET,
    build_model_writer,
    build_reporter,
    data_digest,
    initial_model,
    require_same_data,
    resume,
    saved_adapter,
)
from rltrain.build.recomputation import recompute_what_must_be
from rltrain.checkpoint.random_state import seed_everything
from rltrain.checkpoint.run_state import RunState
from rltrain.config.rules.offline import data_needs, takes_pairs
from rltrain.config.schema import (
    JudgedData,
    LearnerCore,
    Model,
    OfflineEval,
    OfflineRecipe,
    OfflineTrain,
    PreferenceLoss,
)
from rltrain.data.chat import StopTokens
from rltrain.data.judged import Reader, Side
from rltrain.data.key_phrases import degraded_completions
from rltrain.data.labels import LabelSet, are_pairs, load_labels
from rltrain.data.preferences import Pair, PairSet, load_pairs, scale_margins
from rltrain.data.tokenization import Tokenization, tokenization_of
from rltrain.errors import UserError
from rltrain.learner.frozen_models import require_companion
from rltrain.learner.loading import require_weights
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.learner.reward_learner import REWARDS, name_pad_token
from rltrain.learner.row_scoring import LOG_PROBS
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.kto import class_weight_advice
from rltrain.loss.preference.margins import mean_target
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.needs import MARGIN, SCALAR_HEAD, WHOLE_GROUPS
from rltrain.process import Process
from rltrain.registry import BoundMethod
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.train.evaluate_preferences import PreferenceEvaluation, PreferenceEvaluator
from rltrain.train.examples import DegradedTexts, ExampleOrder, Examples, group_by_prompt, prompt_ids
from rltrain.train.offline import OfflineRun
from rltrain.train.own_samples import OwnSamples
from rltrain.types.samples import Prompt, Sampling

TRAIN = "training"
HELD_OUT = "held-out"


@dataclass(frozen=True)
class OfflineInputs:
    """The inputs of a run on judged completions, loaded and checked before any weight."""

    tokenization: Tokenization
    train: PairSet | LabelSet
    held_out: PairSet | LabelSet | None
    loss: BoundMethod


# preparation ------------------------------------------------------------------------------------------------


def load_offline_inputs(recipe: OfflineRecipe) -> OfflineInputs:
    """Tokenizer and examples. Raises ValueError or OSError for a mistake that the user can correct."""
    data = recipe.data
    model = recipe.model
    sizes = {
        "data.max_prompt_tokens": data.max_prompt_tokens,
        "data.max_completion_tokens": data.max_completion_tokens,
    }
    tokenization = tokenization_of(model, sizes, data.chat_template)
    loss = PREFERENCE_LOSSES.bind(recipe.loss.preference.name, recipe.loss.preference.hp)
    head = "new scalar" if SCALAR_HEAD in loss.spec.traits else "logits"
    require_weights(model.path, model.revision, head, model.attention)
    for key, path in (("model.reference", model.reference), ("model.previous", model.previous)):
        if path is not None:
            require_companion(tokenization.tokenizer, model.path, key, path, head="logits", sizes=sizes)

    reader = Reader(tokenization.tokenizer, tokenization.stop_tokens.stop, data)
    load = partial(_load_examples, recipe=recipe, reader=reader, loss=loss)
    held_out = None if data.eval is None else load("eval", limit=None)
    train = load("train", limit=data.max_examples)
    if held_out is not None:
        train = _without_shared_prompts(train, held_out)
        held_out = _sample_examples(held_out, recipe.eval.examples, recipe.seed)
    if isinstance(train, PairSet) and data.divide_margins_by != "nothing":
        assert held_out is None or isinstance(held_out, PairSet)
        train, *others = scale_margins(
            [train] if held_out is None else [train, held_out], data.divide_margins_by
        )
        held_out = others[0] if others else None

    tokenization.require_embedded(_named_token_ids([train] if held_out is None else [train, held_out]))
    build_order(train, loss, recipe.train.examples, recipe.seed)  # refuses a data set smaller than a step
    return OfflineInputs(tokenization, train, held_out, loss)


def _load_examples(
    side: Side, *, recipe: OfflineRecipe, reader: Reader, loss: BoundMethod, limit: int | None
) -> PairSet | LabelSet:
    load = load_pairs if takes_pairs(loss.spec) else load_labels
    return load(
        recipe.data, side, reader, seed=recipe.seed, limit=limit, needs=data_needs(loss.spec, loss.hp)
    )


def _without_shared_prompts(train: PairSet | LabelSet, held_out: PairSet | LabelSet) -> PairSet | LabelSet:
    """``train`` without the examples whose prompt is also held out."""
    reserved = {example.prompt for example in examples_in(held_out)}
    remaining = tuple(example for example in examples_in(train) if example.prompt not in reserved)
    if not remaining:
        raise ValueError(
            f"every prompt of the {len(train)} training examples is also held out, so none is left to train "
            "on; data.eval must be other data (data.where and data.eval_where choose rows of one file)"
        )
    dropped = {**train.dropped, "with a held-out prompt": len(train) - len(remaining)}
    return _with_examples(train, remaining, dropped)


def _sample_examples(held_out: PairSet | LabelSet, count: int, seed: int) -> PairSet | LabelSet:
    """At most ``count`` examples; the two sides of a pair stay together."""
    examples = examples_in(held_out)
    size = 2 if isinstance(held_out, LabelSet) and are_pairs(held_out) else 1
    units = range(len(examples) // size)
    chosen = sorted(Random(stable_hash(seed, "held out")).sample(units, min(count // size, len(units))))
    sample = [examples[size * unit + offset] for unit in chosen for offset in range(size)]
    return _with_examples(held_out, sample, held_out.dropped)


def _named_token_ids(sets: Sequence[PairSet | LabelSet]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, token ids) of every prompt and completion."""
    for example in (item for examples in sets for item in examples_in(examples)):
        sides = (example.chosen, example.rejected) if isinstance(example, Pair) else (example.completion,)
        yield from ((f"example {example.id}", token_ids) for token_ids in (example.prompt, *sides))


def _with_examples(
    examples: PairSet | LabelSet, items: Sequence[Any], dropped: Mapping[str, int]
) -> PairSet | LabelSet:
    if isinstance(examples, PairSet):
        return dataclasses.replace(examples, pairs=tuple(items), dropped=dropped)
    return dataclasses.replace(examples, completions=tuple(items), dropped=dropped)


def summarize_offline(inputs: OfflineInputs) -> Iterator[str]:
    """How many examples were loaded, left out and changed, one line per set; and warnings where data
    and recipe do not fit.
    """
    for name, examples in (("training", inputs.train), ("held-out", inputs.held_out)):
        if examples is None:
            continue
        kind = "pairs" if isinstance(examples, PairSet) else "completions"
        notes = [f"left out: {_format_counts(examples.dropped)}"] if any(examples.dropped.values()) else []
        notes += [_format_counts(examples.changed)] if any(examples.changed.values()) else []
        yield f"{name} {kind}: {len(examples)}" + (f" ({'; '.join(notes)})" if notes else "")
    yield from _advice(inputs)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def _advice(inputs: OfflineInputs) -> Iterator[str]:
    train = inputs.train
    loss = inputs.loss
    values = {name: item.default for name, item in loss.spec.hyperparameters.items()} | dict(loss.hp)
    if isinstance(train, LabelSet) and {"weight_desirable", "weight_undesirable"} <= values.keys():
        advice = class_weight_advice(*train.classes, values["weight_desirable"], values["weight_undesirable"])
        if advice is not None:
            yield f"warning: {advice}"
    if isinstance(train, PairSet) and MARGIN in loss.needs and values.get("gamma") is not None:
        margins = torch.tensor([pair.margin for pair in train.pairs], dtype=torch.float64)
        target = mean_target(margins, values["gamma"])
        yield (
            f"{loss.name}: gamma {values['gamma']:g} makes the mean target of the training pairs {target:.3f}"
        )


# parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfflineState:
    """The state of an offline run that changes from step to step besides the weights; part of every
    checkpoint.

    data: digest of the training examples, in order. frozen: digests of frozen models and their log-probs.
    """

    learner: PreferenceLearner
    order: ExampleOrder
    data: str
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """The fields of RunState that are not the learner's."""
        return {
            "prompts": self.data,
            "pushes": 0,
            "order": self.order.state_dict(),
            "frozen": dict(self.frozen),
        }

    def load_state_dict(self, state: RunState) -> None:
        """Restores everything but the weights and the random generators. Raises UserError for other data."""
        require_same_data(state, self.data, "examples")
        self.learner.restore(state.tensors, state.learner)
        self.order.load_state_dict(state.order)
        self.frozen.update(state.frozen)


def build_offline_run(recipe: OfflineRecipe, inputs: OfflineInputs, context: RunContext) -> OfflineRun:
    """Loads weights; computes the log-probs of frozen models or reads them from the cache."""
    seed_everything(recipe.seed)
    tokenization = inputs.tokenization
    order = build_order(inputs.train, inputs.loss, recipe.train.examples, recipe.seed)
    steps = total_steps(recipe.train, len(inputs.train))
    learner = _build_trained_learner(recipe, tokenization, steps, context)
    state = OfflineState(learner, order, data_digest(examples_in(inputs.train)))
    resumed = resume(context.checkpoint, state)
    plain_recipe = recipe.model_dump(mode="json")
    reporter = build_reporter(recipe.report, plain_recipe, context, steps, resumed, transcripts=None)
    objective = PreferenceObjective(inputs.loss)
    sets = {TRAIN: inputs.train} | ({} if inputs.held_out is None else {HELD_OUT: inputs.held_out})
    examples = annotate_examples(
        sets,
        learner,
        objective,
        model=recipe.model,
        reference=recipe.reference,
        batches=partial(batches_of_run, inputs.loss, recipe.train.examples, recipe.seed, steps),
        seed=recipe.seed,
        fresh=context.is_fresh,
        reporter=reporter,
        proofs=state.frozen,
    )

    evaluator = None
    if inputs.held_out is not None:
        evaluator = build_preference_evaluator(
            recipe.eval,
            recipe.model,
            recipe.data,
            inputs,
            learner,
            examples[HELD_OUT],
            objective,
            recipe.seed,
        )

    return OfflineRun(
        recipe=recipe,
        total_steps=steps,
        learner=learner,
        examples=_with_degraded_texts(examples[TRAIN], recipe, inputs),
        order=order,
        objective=objective,
        evaluator=evaluator,
        reporter=reporter,
        writer=build_model_writer(
            recipe.checkpoint, plain_recipe, tokenization, learner, state.state_dict, context
        ),
        resumed=resumed,
        should_stop=context.should_stop,
    )


def _with_degraded_texts(examples: Examples, recipe: OfflineRecipe, inputs: OfflineInputs) -> Examples:
    """The training examples with the versions of their chosen completions that a degree head compares."""
    degree = recipe.loss.degree
    if degree is None:
        return examples
    assert isinstance(inputs.train, PairSet)
    versions = [
        degraded_completions(pair, inputs.tokenization, degree.levels, degree.share)
        for pair in inputs.train.pairs
    ]
    return dataclasses.replace(examples, degraded=DegradedTexts(versions, recipe.seed))


def _build_trained_learner(
    recipe: OfflineRecipe, tokenization: Tokenization, steps: int, context: RunContext
) -> PreferenceLearner:
    learner = build_preference_learner(
        recipe.model, recipe.learner, recipe.loss, steps, recipe.seed, context.checkpoint, context.process
    )
    recompute_what_must_be(recipe, [learner.trained])
    if learner.scoring is REWARDS:
        pad = cast("int | None", tokenization.tokenizer.pad_token_id)
        name_pad_token(learner.model, pad, tokenization.stop_tokens.stop)
    return learner


def total_steps(train: OfflineTrain, examples: int) -> int:
    """Steps of the whole run; the last step of an epoch takes its missing examples from the next epoch."""
    return train.steps or max(1, math.ceil(train.epochs * examples / train.examples))


def build_preference_learner(
    model: Model,
    settings: LearnerCore,
    loss: PreferenceLoss,
    steps: int,
    seed: int,
    checkpoint: Path | None,
    process: Process,
) -> PreferenceLearner:
    """The learner with the weights of ``model``, or those of ``checkpoint``."""
    spec = PREFERENCE_LOSSES.spec(loss.preference.name)
    return PreferenceLearner(
        initial_model(model, checkpoint),
        settings,
        total_updates=steps,
        seed=seed,
        scoring=REWARDS if SCALAR_HEAD in spec.traits else LOG_PROBS,
        degree=loss.degree,
        adapter_from=saved_adapter(model, checkpoint),
        deadline=process.deadline,
    )


def build_preference_evaluator(
    settings: OfflineEval,
    model: Model,
    data: JudgedData,
    inputs: OfflineInputs,
    learner: PreferenceLearner,
    held_out: Examples,
    objective: PreferenceObjective,
    seed: int,
) -> PreferenceEvaluator:
    assert inputs.held_out is not None
    sides_apart = isinstance(inputs.held_out, LabelSet) and are_pairs(inputs.held_out)
    samples = None
    if settings.samples:
        prompts = [example.prompt for example in examples_in(inputs.held_out)]
        stop_tokens = inputs.tokenization.stop_tokens
        samples = build_own_samples(
            settings.samples, data.max_completion_tokens, model, stop_tokens, prompts, learner, seed
        )
    return PreferenceEvaluator(
        learner, held_out, objective, sides_apart, settings.gamma, samples, settings.spectrum
    )


def build_own_samples(
    count: int,
    max_tokens: int,
    model: Model,
    stop_tokens: StopTokens,
    held_out: Sequence[tuple[int, ...]],
    learner: PreferenceLearner,
    seed: int,
) -> OwnSamples:
    """One completion at temperature 1 for each of ``count`` held-out prompts, or for all if there are fewer.

    max_tokens: of a completion. held_out: token ids of the prompts.
    """
    seed = stable_hash(seed, "own samples")
    distinct = list(dict.fromkeys(held_out))
    chosen = Random(seed).sample(distinct, min(count, len(distinct)))
    engine = build_transformers_engine(
        model,
        learner.trained.settings.precision,
        stop_tokens,
        decode=lambda token_ids: "",  # the texts are not read
        max_rows=256,
        device=learner.device,
    )
    engine.sleep()

    prompts = tuple(Prompt(f"{number:06d}", token_ids, "") for number, token_ids in enumerate(chosen))
    sampling = Sampling(n=1, temperature=1.0, max_tokens=max_tokens, seed=seed)
    sync = Sync(
        [engine], learner.names.ties, sample=1, full_every=1, seed=seed, deadline=learner.trained.deadline
    )
    return OwnSamples(engine, sync, prompts, sampling, learner.trained.deadline)


def evaluate_offline(model: str, recipe: OfflineRecipe, process: Process) -> PreferenceEvaluation:
    """Evaluates ``model`` on the recipe's held-out examples. Its reference is the recipe's, which is
    the recipe's own model by default.
    """
    start = recipe.model
    judged = start.model_copy(
        update={
            "path": model,
            "revision": None,
            "reference": start.reference or start.path,
            "adapter": None,
        }
    )
    recipe = recipe.model_copy(update={"model": judged})
    inputs = load_offline_inputs(recipe)
    if inputs.held_out is None:
        raise UserError("the recipe names no held-out examples; set data.eval")

    learner = build_preference_learner(judged, recipe.learner, recipe.loss, 1, recipe.seed, None, process)
    objective = PreferenceObjective(inputs.loss)
    examples = annotate_examples(
        {HELD_OUT: inputs.held_out},
        learner,
        objective,
        model=judged,
        reference=recipe.reference,
        batches=all_at_once,
        seed=recipe.seed,
        fresh=False,
        reporter=QUIET,
        proofs={},
    )
    evaluator = build_preference_evaluator(
        recipe.eval, judged, recipe.data, inputs, learner, examples[HELD_OUT], objective, recipe.seed
    )
    return evaluator.evaluate()


def build_order(train: PairSet | LabelSet, loss: BoundMethod, per_step: int, seed: int) -> ExampleOrder:
    """Single examples in random order, or all completions of a prompt together if the loss compares
    them.
    """
    prompts = prompt_ids([example.prompt for example in examples_in(train)])
    if WHOLE_GROUPS in loss.spec.traits:
        units = group_by_prompt(prompts)
    else:
        units = [[index] for index in range(len(train))]
    return ExampleOrder(units, per_step, stable_hash(seed, "order"))


def batches_of_run(
    loss: BoundMethod, per_step: int, seed: int, steps: int, part: str, examples: LabelSet
) -> list[Sequence[int]]:
    """The positions of the examples of each step; held-out examples are one batch."""
    if part != TRAIN:
        return all_at_once(part, examples)
    order = build_order(examples, loss, per_step, seed)
    return [order.next() for _ in range(steps)]
