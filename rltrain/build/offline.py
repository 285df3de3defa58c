"""What a recipe that learns from judged completions is made of.

Data are looked at first, weights loaded last, as in ``build.py``.
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
from rltrain.checkpoint.run_state import read_state
from rltrain.config.rules.offline import data_needs, takes_pairs
from rltrain.config.schema import OfflineRecipe
from rltrain.data.chat import StopTokens
from rltrain.data.judged import Reader, Side
from rltrain.data.labels import Labelled, LabelSet, load_labels, paired
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
    examples_of_labels,
    examples_of_pairs,
    given_logps,
    groups_of,
    mismatched_rows,
    prompt_ids,
    rows_of,
    rows_of_labels,
    rows_of_pairs,
)
from rltrain.train.offline import OfflineRun
from rltrain.train.own_samples import OwnSamples
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Prompt, Sampling
from rltrain.weight_names import CheckpointNames

TRAIN, HELD_OUT = "training", "held-out"
_MISMATCHED = ", mismatched"
_FROZEN = ("ref_logp", "previous_logp")


@dataclass(frozen=True)
class OfflineInputs:
    """What a run works on, loaded and checked before any weight is."""

    tokenization: Tokenization
    train: PairSet | LabelSet
    held_out: PairSet | LabelSet | None
    loss: BoundMethod


# preparation ------------------------------------------------------------------------------------------------


def load_offline_inputs(recipe: OfflineRecipe) -> OfflineInputs:
    """Tokenizer and examples. Raises ValueError or OSError on what a user can mend."""
    data, model = recipe.data, recipe.model
    sizes = {
        "data.max_prompt_tokens": data.max_prompt_tokens,
        "data.max_completion_tokens": data.max_completion_tokens,
    }
    tokenization = tokenization_of(model, sizes)
    loss = PREFERENCE_LOSSES.bind(recipe.loss.preference.name, recipe.loss.preference.hp)
    require_weights(
        model.path, model.revision, "new scalar" if "scalar_head" in loss.spec.traits else "logits"
    )
    for key, path in (("model.reference", model.reference), ("model.previous", model.previous)):
        if path is not None:
            require_companion(tokenization.tokenizer, model.path, key, path, head="logits", sizes=sizes)
    reader = Reader(tokenization.tokenizer, tokenization.stop_tokens.stop, data)
    load = partial(_loaded, recipe=recipe, reader=reader, loss=loss)
    held_out = None if data.eval is None else load("eval", limit=None)
    train = load("train", limit=data.max_examples)
    if held_out is not None:
        train, held_out = (
            _without_shared_prompts(train, held_out),
            _sample(held_out, recipe.eval.examples, recipe.seed),
        )
    if isinstance(train, PairSet) and data.divide_margins_by != "nothing":
        assert held_out is None or isinstance(held_out, PairSet)
        train, *others = scale_margins(
            [train] if held_out is None else [train, held_out], data.divide_margins_by
        )
        held_out = others[0] if others else None
    tokenization.require_embedded(_texts([train] if held_out is None else [train, held_out]))
    _order(recipe, train, loss)  # refuses a data set smaller than a step
    return OfflineInputs(tokenization, train, held_out, loss)


def _loaded(
    side: Side, *, recipe: OfflineRecipe, reader: Reader, loss: BoundMethod, limit: int | None
) -> PairSet | LabelSet:
    load = load_pairs if takes_pairs(loss.spec) else load_labels
    return load(
        recipe.data, side, reader, seed=recipe.seed, limit=limit, needs=data_needs(loss.spec, loss.hp)
    )


def _without_shared_prompts(train: PairSet | LabelSet, held_out: PairSet | LabelSet) -> PairSet | LabelSet:
    """``train`` less the examples whose prompt is among the held-out ones."""
    reserved = {one.prompt for one in _items(held_out)}
    kept = tuple(one for one in _items(train) if one.prompt not in reserved)
    if not kept:
        raise ValueError(
            f"every prompt of the {len(train)} training examples is also held out, so none is left to train "
            "on; data.eval must be other "
            "data (data.where and data.eval_where choose rows of one file)"
        )
    dropped = {**train.dropped, "with a held-out prompt": len(train) - len(kept)}
    return _with_items(train, kept, dropped)


def _sample(held_out: PairSet | LabelSet, most: int, seed: int) -> PairSet | LabelSet:
    """At most so many examples; the sides of a pair stay together."""
    items, size = _items(held_out), 2 if isinstance(held_out, LabelSet) and paired(held_out) else 1
    units = range(len(items) // size)
    chosen = sorted(Random(stable_hash(seed, "held out")).sample(units, min(most // size, len(units))))
    return _with_items(
        held_out, [items[size * unit + at] for unit in chosen for at in range(size)], held_out.dropped
    )


def _texts(sets: Sequence[PairSet | LabelSet]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, token ids) of every prompt and completion."""
    for one in (item for examples in sets for item in _items(examples)):
        sides = (one.chosen, one.rejected) if isinstance(one, Pair) else (one.completion,)
        yield from ((f"example {one.id}", token_ids) for token_ids in (one.prompt, *sides))


def _items(examples: PairSet | LabelSet) -> Sequence[Any]:
    return examples.pairs if isinstance(examples, PairSet) else examples.completions


def _with_items(
    examples: PairSet | LabelSet, items: Sequence[Any], dropped: Mapping[str, int]
) -> PairSet | LabelSet:
    if isinstance(examples, PairSet):
        return dataclasses.replace(examples, pairs=tuple(items), dropped=dropped)
    return dataclasses.replace(examples, completions=tuple(items), dropped=dropped)


def summarize_offline(inputs: OfflineInputs) -> Iterator[str]:
    """What was loaded, what was left out and what was changed, one line each; and what the data say
    against the recipe.
    """
    for name, found in (("training", inputs.train), ("held-out", inputs.held_out)):
        if found is None:
            continue
        what = "pairs" if isinstance(found, PairSet) else "completions"
        notes = [f"left out: {_counts(found.dropped)}"] if any(found.dropped.values()) else []
        notes += [_counts(found.changed)] if any(found.changed.values()) else []
        yield f"{name} {what}: {len(found)}" + (f" ({'; '.join(notes)})" if notes else "")
    yield from _advice(inputs)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _advice(inputs: OfflineInputs) -> Iterator[str]:
    train, loss = inputs.train, inputs.loss
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
    process, tokenization = context.process, inputs.tokenization
    order, steps = _order(recipe, inputs.train, inputs.loss), total_steps(recipe, len(inputs.train))
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
    data = data_digest(_items(inputs.train))
    if resumed is not None:
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
    """Steps of the whole run; the last one of an epoch goes on into the next."""
    return recipe.train.steps or max(1, math.ceil(recipe.train.epochs * examples / recipe.train.examples))


def build_preference_learner(
    recipe: OfflineRecipe, steps: int, checkpoint: Path | None, process: Process
) -> PreferenceLearner:
    """With the recipe's weights, or those of ``checkpoint``."""
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
    sides_apart = isinstance(inputs.held_out, LabelSet) and paired(inputs.held_out)
    samples = None
    if recipe.eval.samples:
        examples, stop_tokens = _items(inputs.held_out), inputs.tokenization.stop_tokens
        samples = build_own_samples(recipe, stop_tokens, examples, learner.names, process)
    return PreferenceEvaluator(learner, held_out, objective, sides_apart, recipe.eval.gamma, samples)


def build_own_samples(
    recipe: OfflineRecipe,
    stop_tokens: StopTokens,
    held_out: Sequence[Pair | Labelled],
    names: CheckpointNames,
    process: Process,
) -> OwnSamples:
    """One completion at temperature 1 of ``eval.samples`` held-out prompts, or of all where there are
    fewer.
    """
    seed = stable_hash(recipe.seed, "own samples")
    distinct = list(dict.fromkeys(example.prompt for example in held_out))
    chosen = Random(seed).sample(distinct, min(recipe.eval.samples, len(distinct)))
    engine = build_transformers_engine(
        recipe.model,
        recipe.learner.precision,
        stop_tokens,
        decode=lambda token_ids: "",  # nothing reads the texts
        max_rows=256,
        device=process.device,
    )
    engine.sleep()
    prompts = tuple(Prompt(f"{number:06d}", token_ids, "") for number, token_ids in enumerate(chosen))
    sampling = Sampling(n=1, temperature=1.0, max_tokens=recipe.data.max_completion_tokens, seed=seed)
    sync = Sync([engine], names.ties, sample=1, full_every=1, seed=seed, deadline=process.deadline)
    return OwnSamples(engine, sync, prompts, sampling, process.deadline)


def evaluate_offline(model: str, recipe: OfflineRecipe, process: Process) -> PreferenceEvaluation:
    """``model`` on the recipe's held-out examples; its reference is the recipe's, which by default is
    the recipe's own model.
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
    objective, sets = PreferenceObjective(inputs.loss), {HELD_OUT: inputs.held_out}
    examples = annotate_examples(recipe, sets, learner, objective, 1, fresh=False, reporter=QUIET)
    evaluator = build_preference_evaluator(recipe, inputs, learner, examples[HELD_OUT], objective, process)
    return evaluator.evaluate()


def _order(recipe: OfflineRecipe, train: PairSet | LabelSet, loss: BoundMethod) -> ExampleOrder:
    """Single examples in random order, or all completions of a prompt at a time where the loss
    compares them.
    """
    prompts = prompt_ids([one.prompt for one in _items(train)])
    units = groups_of(prompts) if "whole_groups" in loss.spec.traits else [[at] for at in range(len(train))]
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
    """The sets by name (TRAIN, HELD_OUT) with what frozen models say of them.

    fresh: the learner still holds the starting weights, so that it can speak for the model it started from.
    """
    paths = {"ref_logp": recipe.model.reference, "previous_logp": recipe.model.previous}
    wanted = {name: paths[name] for name in _FROZEN if name in objective.needs}
    mismatched = "mismatched" in objective.needs
    if mismatched:
        wanted.setdefault("ref_logp", paths["ref_logp"])
    found: dict[tuple[str, str], Tensor] = {}  # (which examples, which log-probs)
    use = recipe.reference.given == "use" and "ref_logp" in wanted
    brought = {part: given_logps(_items(one)) for part, one in sets.items()} if use else {}
    for path in dict.fromkeys(wanted.values()):
        with _frozen(recipe, learner, path, fresh, reporter) as frozen:
            for part, rows, sides in _row_sets(recipe, sets, objective.loss, steps, mismatched):
                what, given = f"{path or recipe.model.path} on the {part} completions", None
                if path == paths["ref_logp"]:
                    given = brought.get(part)
                logp = (
                    frozen.of(rows, sides=sides, what=what)
                    if given is None
                    else frozen.given(rows, given, what=what)
                )
                found |= {(part, name): logp for name in wanted if wanted[name] == path}
    return {part: _examples(one, part, found, recipe.seed) for part, one in sets.items()}


@contextlib.contextmanager
def _frozen(
    recipe: OfflineRecipe, learner: PreferenceLearner, path: str | None, fresh: bool, reporter: Reporter
) -> Iterator[FrozenLogProbs]:
    """The log-probs of the model at ``path``, None being the starting point; loaded by itself only
    where it must be.
    """
    folder = None if recipe.reference.cache is None else Path(recipe.reference.cache).expanduser()
    make = partial(
        FrozenLogProbs, learner, folder=folder, verify=recipe.reference.verify, say=reporter.message
    )
    if path is None and fresh:
        yield make(frozen=None, weights=weights_digest(learner.model_weights()))
        return
    with frozen_model(path, recipe.model, learner.device) as frozen:
        yield make(frozen=frozen, weights=weights_digest(weights_of(frozen)))


def _row_sets(
    recipe: OfflineRecipe,
    sets: Mapping[str, PairSet | LabelSet],
    loss: BoundMethod,
    steps: int,
    mismatched: bool,
) -> Iterator[tuple[str, TokenRows, int]]:
    """(name, rows, rows per example) of everything that is scored."""
    for name, found in sets.items():
        rows = rows_of_pairs(found.pairs) if isinstance(found, PairSet) else rows_of_labels(found.completions)
        yield name, rows, 2 if isinstance(found, PairSet) else 1
        if mismatched and isinstance(found, LabelSet):
            order = _order(recipe, found, loss) if name == TRAIN else None
            batches = [range(len(found))] if order is None else [order.next() for _ in range(steps)]
            yield f"{name}{_MISMATCHED}", _all_mismatched(rows, found, batches, recipe.seed), 1


def _all_mismatched(
    rows: TokenRows, found: LabelSet, batches: Sequence[Sequence[int]], seed: int
) -> TokenRows:
    """KTO's mismatched rows of every step, one after the other."""
    prompts, completions = list[tuple[int, ...]](), list[tuple[int, ...]]()
    ids = prompt_ids([one.prompt for one in found.completions])
    for step, chosen in enumerate(batches, start=1):
        others = mismatched_rows(rows_of(rows, chosen, 1), ids[torch.tensor(chosen)], seed, step)
        prompts += others.prompts
        completions += others.completions
    return TokenRows(tuple(prompts), tuple(completions))


def _examples(
    found: PairSet | LabelSet, part: str, logps: Mapping[tuple[str, str], Tensor], seed: int
) -> Examples:
    own = {name: value for (of, name), value in logps.items() if of == part}
    if isinstance(found, PairSet):
        return examples_of_pairs(found.pairs, own)
    others = logps.get((part + _MISMATCHED, "ref_logp"))
    return examples_of_labels(found.completions, own, None if others is None else Mismatches(seed, others))
