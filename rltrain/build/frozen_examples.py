"""Examples with the log-probs of frozen models, computed once or read from disk or from the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.config.schema import OfflineModel, Reference
from rltrain.data.labels import LabelSet
from rltrain.data.preferences import PairSet
from rltrain.learner.adapter_off import FrozenModel
from rltrain.learner.frozen_logprobs import FrozenLogProbs
from rltrain.learner.frozen_models import frozen_model, weights_digest
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.needs import MISMATCHED
from rltrain.report.reporter import Reporter
from rltrain.train.examples import (
    Examples,
    Mismatches,
    data_ref_logps,
    examples_of_labels,
    examples_of_pairs,
    mismatched_rows,
    prompt_ids,
    rows_of_labels,
    rows_of_pairs,
    select_rows,
)
from rltrain.types.policy import TokenRows

__all__ = ["Batches", "all_at_once", "annotate_examples", "examples_in"]

_MISMATCHED = ", mismatched"
_FROZEN = ("ref_logp", "previous_logp")
# (name of the set, its completions) -> the positions of the completions of each batch
Batches = Callable[[str, LabelSet], Sequence[Sequence[int]]]


def examples_in(examples: PairSet | LabelSet) -> Sequence[Any]:
    return examples.pairs if isinstance(examples, PairSet) else examples.completions


def all_at_once(name: str, examples: LabelSet) -> list[Sequence[int]]:
    """One batch of all completions."""
    del name
    return [range(len(examples))]


def annotate_examples(
    sets: Mapping[str, PairSet | LabelSet],
    learner: PreferenceLearner,
    objective: PreferenceObjective,
    *,
    model: OfflineModel,
    reference: Reference,
    batches: Batches,
    seed: int,
    fresh: bool,
    reporter: Reporter,
    proofs: dict[str, str],
) -> dict[str, Examples]:
    """The sets by name with the log-probs of frozen models.

    batches: of the completions that are paired with the prompts of others. fresh: the learner still has its
    starting weights, so that it can stand in for the starting model. proofs: digests of frozen models and of
    their log-probs that the run had before; extended here.
    """
    paths = {"ref_logp": model.reference, "previous_logp": model.previous}
    needed_paths = {name: paths[name] for name in _FROZEN if name in objective.needs}
    mismatched = MISMATCHED in objective.needs
    if mismatched:
        needed_paths.setdefault("ref_logp", paths["ref_logp"])
    data_logps = {}
    if reference.given == "use" and "ref_logp" in needed_paths:
        data_logps = {part: data_ref_logps(examples_in(examples)) for part, examples in sets.items()}

    logps: dict[tuple[str, str], Tensor] = {}  # by (which examples, which log-probs)
    for path in dict.fromkeys(needed_paths.values()):
        with _open_frozen_log_probs(reference, model, learner, path, fresh, reporter, proofs) as frozen:
            for part, rows, sides in _row_sets(sets, batches if mismatched else None, seed):
                description = f"{path or model.path} on the {part} completions"
                from_data = data_logps.get(part) if path == paths["ref_logp"] else None
                logp = (
                    frozen.log_probs(rows, sides=sides, what=description)
                    if from_data is None
                    else frozen.check_log_probs(rows, from_data, what=description)
                )
                logps |= {(part, name): logp for name in needed_paths if needed_paths[name] == path}
    return {part: _build_examples(examples, part, logps, seed) for part, examples in sets.items()}


@contextlib.contextmanager
def _open_frozen_log_probs(
    reference: Reference,
    model: OfflineModel,
    learner: PreferenceLearner,
    path: str | None,
    fresh: bool,
    reporter: Reporter,
    proofs: dict[str, str],
) -> Iterator[FrozenLogProbs]:
    """The log-probs of the model at ``path``; None: the starting model, which is loaded a second time
    only if the learner no longer has its weights, nor an adapter to switch off. A resumed run loads it only
    if it has lost the log-probs.
    """
    folder = None if reference.cache is None else Path(reference.cache).expanduser()
    build = partial(
        FrozenLogProbs,
        learner,
        folder=folder,
        verify=reference.verify,
        say=reporter.message,
        proofs=proofs,
    )
    name = f"weights of {path or 'the starting model'}"
    if path is None and fresh:
        proofs[name] = weights_digest(learner.model_weights())
        yield build(frozen=None, weights=proofs[name])
        return
    with contextlib.ExitStack() as stack:

        @cache
        def load() -> FrozenModel:
            frozen, proofs[name] = stack.enter_context(frozen_model(path, model, learner.trained))
            return frozen

        if name not in proofs:
            load()
        yield build(frozen=None, weights=proofs[name], load=load)


def _row_sets(
    sets: Mapping[str, PairSet | LabelSet], batches: Batches | None, seed: int
) -> Iterator[tuple[str, TokenRows, int]]:
    """(name, rows, rows per example) of every set that is scored.

    batches: of the completions that are also scored with mismatched prompts; None: none are.
    """
    for name, examples in sets.items():
        if isinstance(examples, PairSet):
            yield name, rows_of_pairs(examples.pairs), 2
            continue
        rows = rows_of_labels(examples.completions)
        yield name, rows, 1
        if batches is not None:
            yield f"{name}{_MISMATCHED}", _mismatched_rows(rows, examples, batches(name, examples), seed), 1


def _mismatched_rows(
    rows: TokenRows, examples: LabelSet, batches: Sequence[Sequence[int]], seed: int
) -> TokenRows:
    """KTO's mismatched rows of all steps, in order."""
    prompts: list[tuple[int, ...]] = []
    completions: list[tuple[int, ...]] = []
    scored: list[tuple[bool, ...]] = []
    ids = prompt_ids([example.prompt for example in examples.completions])
    for step, batch in enumerate(batches, start=1):
        others = mismatched_rows(select_rows(rows, batch, 1), ids[torch.tensor(batch)], seed, step)
        prompts += others.prompts
        completions += others.completions
        scored += others.scored or ()
    return TokenRows(tuple(prompts), tuple(completions), tuple(scored) if scored else None)


def _build_examples(
    examples: PairSet | LabelSet, part: str, logps: Mapping[tuple[str, str], Tensor], seed: int
) -> Examples:
    part_logps = {name: value for (source, name), value in logps.items() if source == part}
    if isinstance(examples, PairSet):
        return examples_of_pairs(examples.pairs, part_logps)
    mismatched_logps = logps.get((part + _MISMATCHED, "ref_logp"))
    mismatches = None if mismatched_logps is None else Mismatches(seed, mismatched_logps)
    return examples_of_labels(examples.completions, part_logps, mismatches)
