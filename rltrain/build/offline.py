"""Builds the run of a recipe that learns from judged completions.

Data are checked first and weights are loaded last, as in ``build/online.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor

from rltrain.build.context import RunContext
from rltrain.build.engines import build_transformers_engine
from rltrain.build.outputs import (
    QUIET,
    build_model_writer,
    build_reporter,
    data_digest,
    initial_model,
    require_same_data,
)
from rltrain.checkpoint.random_state import seed_everything
from rltrain.checkpoint.run_state import read_state, restoring
from rltrain.config.rules.offline import data_needs, takes_pairs
from rltrain.config.schema import OfflineRecipe
from rltrain.data.chat import StopTokens
from rltrain.data.judged import Reader, Side
from rltrain.data.labels import LabelledCompletion, LabelSet, are_pairs, load_labels
from rltrain.data.preferences import Pair, PairSet, load_pairs, scale_margins
from rltrain.data.tokenization import Tokenization, tokenization_of
from rltrain.errors import UserError
from rltrain.learner.frozen_logprobs import FrozenLogProbs, weights_digest
from rltrain.learner.frozen_models import frozen_model, require_companion, weights_of
from rltrain.learner.loading import require_weights
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.learner.reward_learner import REWARDS, name_pad_token
from rltrain.learner.row_scoring import LOG_PROBS
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.kto import class_weight_advice
from rltrain.loss.preference.margins import mean_target
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.process import Process
from rltrain.registry import BoundMethod
from rltrain.report.reporter import Reporter
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.train.evaluate_preferences import PreferenceEvaluation, PreferenceEvaluator
from rltrain.train.examples import (
    ExampleOrder,
    Examples,
    Mismatches,
    data_ref_logps,
    examples_of_labels,
    examples_of_pairs,
    group_by_prompt,
    mismatched_rows,
    prompt_ids,
    rows_of_labels,
    rows_of_pairs,
    select_rows,
)
from rltrain.train.offline import OfflineRun
from rltrain.train.own_samples import OwnSamples
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Prompt, Sampling
from rltrain.weight_names import CheckpointNames

TRAIN = "training"
HELD_OUT = "held-out"
_MISMATCHED = ", mismatched"
_FROZEN = ("ref_logp", "previous_logp")


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
    tokenization = tokenization_of(model, sizes)
    loss = PREFERENCE_LOSSES.bind(recipe.loss.preference.name, recipe.loss.preference.hp)
    head = "new scalar" if "scalar_head" in loss.spec.traits else "logits"
    require_weights(model.path, model.revision, head)
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
    _build_order(recipe, train, loss)  # refuses a data set smaller than a step
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
    reserved = {example.prompt for example in _examples_in(held_out)}
    remaining = tuple(example for example in _examples_in(train) if example.prompt not in reserved)
    if not remaining:
        raise ValueError(
            f"every prompt of the {len(train)} training examples is also held out, so none is left to train "
            "on; data.eval must be other data (data.where and data.eval_where choose rows of one file)"
        )
    dropped = {**train.dropped, "with a held-out prompt": len(train) - len(remaining)}
    return _with_examples(train, remaining, dropped)


def _sample_examples(held_out: PairSet | LabelSet, count: int, seed: int) -> PairSet | LabelSet:
    """At most ``count`` examples; the two sides of a pair stay together."""
    examples = _examples_in(held_out)
    size = 2 if isinstance(held_out, LabelSet) and are_pairs(held_out) else 1
    units = range(len(examples) // size)
    chosen = sorted(Random(stable_hash(seed, "held out")).sample(units, min(count // size, len(units))))
    sample = [examples[size * unit + offset] for unit in chosen for offset in range(size)]
    return _with_examples(held_out, sample, held_out.dropped)


def _named_token_ids(sets: Sequence[PairSet | LabelSet]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, token ids) of every prompt and completion."""
    for example in (item for examples in sets for item in _examples_in(examples)):
        sides = (example.chosen, example.rejected) if isinstance(example, Pair) else (example.completion,)
        yield from ((f"example {example.id}", token_ids) for token_ids in (example.prompt, *sides))


def _examples_in(examples: PairSet | LabelSet) -> Sequence[Any]:
    return examples.pairs if isinstance(examples, PairSet) else examples.completions


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
    if isinstance(train, PairSet) and "margin" in loss.needs and values.get("gamma") is not None:
        margins = torch.tensor([pair.margin for pair in train.pairs], dtype=torch.float64)
        target = mean_target(margins, values["gamma"])
        yield (
            f"{loss.name}: gamma {values['gamma']:g} makes the mean target of the training pairs {target:.3f}"
        )


# parts ------------------------------------------------------------------------------------------------------


def build_offline_run(recipe: OfflineRecipe, inputs: OfflineInputs, context: RunContext) -> OfflineRun:
    """Loads weights; computes the log-probs of frozen models or reads them from the cache."""
    seed_everything(recipe.seed)
    process = context.process
    tokenization = inputs.tokenization
    order = _build_order(recipe, inputs.train, inputs.loss)
    steps = total_steps(recipe, len(inputs.train))
    learner = build_preference_learner(recipe, steps, context.checkpoint, process)
    if learner.scoring is REWARDS:
        pad = cast("int | None", tokenization.tokenizer.pad_token_id)
        name_pad_token(learner.model, pad, tokenization.stop_tokens.stop)

    resumed = None if context.checkpoint is None else read_state(context.checkpoint)
    reporter = build_reporter(recipe, context, steps, resumed, transcripts=None)
    objective = PreferenceObjective(inputs.loss)
    sets = {TRAIN: inputs.train} | ({} if inputs.held_out is None else {HELD_OUT: inputs.held_out})
    examples = annotate_examples(
        recipe, sets, learner, objective, steps, fresh=context.is_fresh, reporter=reporter
    )

    data = data_digest(_examples_in(inputs.train))
    if resumed is not None and context.checkpoint is not None:
        with restoring(context.checkpoint):
            require_same_data(resumed, data, "examples")
            learner.restore(resumed.tensors, resumed.learner)
            order.load_state_dict(resumed.order)

    evaluator = None
    if inputs.held_out is not None:
        evaluator = build_preference_evaluator(
            recipe, inputs, learner, examples[HELD_OUT], objective, process
        )

    def progress() -> dict[str, Any]:
        return {"prompts": data, "pushes": 0, "order": order.state_dict()}

    return OfflineRun(
        recipe=recipe,
        total_steps=steps,
        learner=learner,
        examples=examples[TRAIN],
        order=order,
        objective=objective,
        evaluator=evaluator,
        reporter=reporter,
        writer=build_model_writer(recipe, tokenization, learner, progress, context),
        resumed=resumed,
        should_stop=context.should_stop,
    )


def total_steps(recipe: OfflineRecipe, examples: int) -> int:
    """Steps of the whole run; the last step of an epoch takes its missing examples from the next epoch."""
    return recipe.train.steps or max(1, math.ceil(recipe.train.epochs * examples / recipe.train.examples))


def build_preference_learner(
    recipe: OfflineRecipe, steps: int, checkpoint: Path | None, process: Process
) -> PreferenceLearner:
    """The learner with the recipe's weights, or those of ``checkpoint``."""
    model = initial_model(recipe.model, checkpoint)
    spec = PREFERENCE_LOSSES.spec(recipe.loss.preference.name)
    return PreferenceLearner(
        model,
        recipe.learner,
        total_updates=steps,
        seed=recipe.seed,
        scoring=REWARDS if "scalar_head" in spec.traits else LOG_PROBS,
        deadline=process.deadline,
    )


def build_preference_evaluator(
    recipe: OfflineRecipe,
    inputs: OfflineInputs,
    learner: PreferenceLearner,
    held_out: Examples,
    objective: PreferenceObjective,
    process: Process,
) -> PreferenceEvaluator:
    assert inputs.held_out is not None
    sides_apart = isinstance(inputs.held_out, LabelSet) and are_pairs(inputs.held_out)
    samples = None
    if recipe.eval.samples:
        examples = _examples_in(inputs.held_out)
        stop_tokens = inputs.tokenization.stop_tokens
        samples = build_own_samples(recipe, stop_tokens, examples, learner.names, process)
    return PreferenceEvaluator(learner, held_out, objective, sides_apart, recipe.eval.gamma, samples)


def build_own_samples(
    recipe: OfflineRecipe,
    stop_tokens: StopTokens,
    held_out: Sequence[Pair | LabelledCompletion],
    names: CheckpointNames,
    process: Process,
) -> OwnSamples:
    """One completion at temperature 1 for each of ``eval.samples`` held-out prompts, or for all if
    there are fewer.
    """
    seed = stable_hash(recipe.seed, "own samples")
    distinct = list(dict.fromkeys(example.prompt for example in held_out))
    chosen = Random(seed).sample(distinct, min(recipe.eval.samples, len(distinct)))
    engine = build_transformers_engine(
        recipe.model,
        recipe.learner.precision,
        stop_tokens,
        decode=lambda token_ids: "",  # the texts are not read
        max_rows=256,
        device=process.device,
    )
    engine.sleep()

    prompts = tuple(Prompt(f"{number:06d}", token_ids, "") for number, token_ids in enumerate(chosen))
    sampling = Sampling(n=1, temperature=1.0, max_tokens=recipe.data.max_completion_tokens, seed=seed)
    sync = Sync([engine], names.ties, sample=1, full_every=1, seed=seed, deadline=process.deadline)
    return OwnSamples(engine, sync, prompts, sampling, process.deadline)


def evaluate_offline(model: str, recipe: OfflineRecipe, process: Process) -> PreferenceEvaluation:
    """Evaluates ``model`` on the recipe's held-out examples. Its reference is the recipe's, which is
    the recipe's own model by default.
    """
    start = recipe.model
    judged = start.model_copy(
        update={"path": model, "revision": None, "reference": start.reference or start.path}
    )
    recipe = recipe.model_copy(update={"model": judged})
    inputs = load_offline_inputs(recipe)
    if inputs.held_out is None:
        raise UserError("the recipe names no held-out examples; set data.eval")

    learner = build_preference_learner(recipe, 1, None, process)
    objective = PreferenceObjective(inputs.loss)
    sets = {HELD_OUT: inputs.held_out}
    examples = annotate_examples(recipe, sets, learner, objective, 1, fresh=False, reporter=QUIET)
    evaluator = build_preference_evaluator(recipe, inputs, learner, examples[HELD_OUT], objective, process)
    return evaluator.evaluate()


def _build_order(recipe: OfflineRecipe, train: PairSet | LabelSet, loss: BoundMethod) -> ExampleOrder:
    """Single examples in random order, or all completions of a prompt together if the loss compares
    them.
    """
    prompts = prompt_ids([example.prompt for example in _examples_in(train)])
    if "whole_groups" in loss.spec.traits:
        units = group_by_prompt(prompts)
    else:
        units = [[index] for index in range(len(train))]
    return ExampleOrder(units, recipe.train.examples, stable_hash(recipe.seed, "order"))


# frozen log-probs -------------------------------------------------------------------------------------------


def annotate_examples(
    recipe: OfflineRecipe,
    sets: Mapping[str, PairSet | LabelSet],
    learner: PreferenceLearner,
    objective: PreferenceObjective,
    steps: int,
    *,
    fresh: bool,
    reporter: Reporter,
) -> dict[str, Examples]:
    """The sets by name (TRAIN, HELD_OUT) with the log-probs of frozen models.

    fresh: the learner still has its starting weights, so that it can stand in for the starting model.
    """
    paths = {"ref_logp": recipe.model.reference, "previous_logp": recipe.model.previous}
    needed_paths = {name: paths[name] for name in _FROZEN if name in objective.needs}
    mismatched = "mismatched" in objective.needs
    if mismatched:
        needed_paths.setdefault("ref_logp", paths["ref_logp"])
    data_logps = {}
    if recipe.reference.given == "use" and "ref_logp" in needed_paths:
        data_logps = {part: data_ref_logps(_examples_in(examples)) for part, examples in sets.items()}

    logps: dict[tuple[str, str], Tensor] = {}  # by (which examples, which log-probs)
    for path in dict.fromkeys(needed_paths.values()):
        with _open_frozen_log_probs(recipe, learner, path, fresh, reporter) as frozen:
            for part, rows, sides in _row_sets(recipe, sets, objective.loss, steps, mismatched):
                description = f"{path or recipe.model.path} on the {part} completions"
                from_data = data_logps.get(part) if path == paths["ref_logp"] else None
                logp = (
                    frozen.log_probs(rows, sides=sides, what=description)
                    if from_data is None
                    else frozen.check_log_probs(rows, from_data, what=description)
                )
                logps |= {(part, name): logp for name in needed_paths if needed_paths[name] == path}
    return {part: _build_examples(examples, part, logps, recipe.seed) for part, examples in sets.items()}


@contextlib.contextmanager
def _open_frozen_log_probs(
    recipe: OfflineRecipe, learner: PreferenceLearner, path: str | None, fresh: bool, reporter: Reporter
) -> Iterator[FrozenLogProbs]:
    """The log-probs of the model at ``path``; None: the starting model, which is loaded a second time
    only if the learner no longer has its weights.
    """
    folder = None if recipe.reference.cache is None else Path(recipe.reference.cache).expanduser()
    build = partial(
        FrozenLogProbs, learner, folder=folder, verify=recipe.reference.verify, say=reporter.message
    )
    if path is None and fresh:
        yield build(frozen=None, weights=weights_digest(learner.model_weights()))
        return
    with frozen_model(path, recipe.model, learner.device) as frozen:
        yield build(frozen=frozen, weights=weights_digest(weights_of(frozen)))


def _row_sets(
    recipe: OfflineRecipe,
    sets: Mapping[str, PairSet | LabelSet],
    loss: BoundMethod,
    steps: int,
    mismatched: bool,
) -> Iterator[tuple[str, TokenRows, int]]:
    """(name, rows, rows per example) of every set that is scored."""
    for name, examples in sets.items():
        if isinstance(examples, PairSet):
            yield name, rows_of_pairs(examples.pairs), 2
            continue
        rows = rows_of_labels(examples.completions)
        yield name, rows, 1
        if mismatched:
            order = _build_order(recipe, examples, loss) if name == TRAIN else None
            batches = [range(len(examples))] if order is None else [order.next() for _ in range(steps)]
            yield f"{name}{_MISMATCHED}", _mismatched_rows(rows, examples, batches, recipe.seed), 1


def _mismatched_rows(
    rows: TokenRows, examples: LabelSet, batches: Sequence[Sequence[int]], seed: int
) -> TokenRows:
    """KTO's mismatched rows of all steps, in order."""
    prompts: list[tuple[int, ...]] = []
    completions: list[tuple[int, ...]] = []
    ids = prompt_ids([example.prompt for example in examples.completions])
    for step, batch in enumerate(batches, start=1):
        others = mismatched_rows(select_rows(rows, batch, 1), ids[torch.tensor(batch)], seed, step)
        prompts += others.prompts
        completions += others.completions
    return TokenRows(tuple(prompts), tuple(completions))


def _build_examples(
    examples: PairSet | LabelSet, part: str, logps: Mapping[tuple[str, str], Tensor], seed: int
) -> Examples:
    part_logps = {name: value for (source, name), value in logps.items() if source == part}
    if isinstance(examples, PairSet):
        return examples_of_pairs(examples.pairs, part_logps)
    mismatched_logps = logps.get((part + _MISMATCHED, "ref_logp"))
    mismatches = None if mismatched_logps is None else Mismatches(seed, mismatched_logps)
    return examples_of_labels(examples.completions, part_logps, mismatches)
