"""``rltrain score`` and ``rltrain eval --select``: the uses of a process reward model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from rltrain.analysis.best_of_n import n_for_kl
from rltrain.analysis.selection import Samples, selections
from rltrain.build.local_inputs import require_sampled
from rltrain.build.scorer import (
    NONE,
    ProcessModel,
    open_scorer,
    read_file,
    scorer_tokenization,
    step_end_finder,
    text_row,
)
from rltrain.checkpoint.run_folder import write_atomic
from rltrain.cli.evaluate import evaluate_model, show_evaluation, show_numbers
from rltrain.config.schema import AnyRecipe, JudgedData, Model, SampledRecipe
from rltrain.data.tokenization import Tokenization, tokenization_of
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.frozen_models import require_same_tokens
from rltrain.learner.reward_model import rewards_of
from rltrain.model_files import config_source
from rltrain.model_limits import context_of
from rltrain.remote_code import refusing_untrusted, trusts
from rltrain.report.statistics import average_at_k
from rltrain.seeds import stable_hash
from rltrain.train.evaluate import Evaluation
from rltrain.train.scoring import TextRow
from rltrain.types.policy import TokenRows

_SIZES = (1, 2, 4, 8, 16)  # of the sets of answers from which one is chosen
_SCORED = ("implicit_prm", "rm", "weighted_majority")  # selectors that need a model's scores


def score_command(
    model: ProcessModel,
    file: Path,
    out: Path,
    steps: str,
    columns: Mapping[str, str],
    data: JudgedData,
    with_tokens: bool,
) -> int:
    """``rltrain score``: process rewards of the completions in ``file``, one JSON line for each, in
    their order. ``out`` is written atomically.
    """
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    with user_mistakes():
        tokenization = scorer_tokenization(model)
        with refusing_untrusted(model.path):
            source, revision = config_source(model.path, None)
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trusts(source))
            context = context_of(config)
        rows = read_file(
            file, columns, steps, tokenization, data, None if context is None else context.tokens
        )
    texts = [row.text for row in rows if row.text is not None]
    with open_scorer(model, say) as scorer:
        scored = iter(scorer.score(texts, lambda count: say(f"scored {count} of {len(texts)}")))
    lines = [
        row.line({} if row.text is None else next(scored).columns(with_tokens=with_tokens)) for row in rows
    ]
    write_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    reasons = Counter(row.reason for row in rows if row.text is None)
    for reason, count in reasons.items():
        say(f"warning: {count} not scored: {reason}")
    say(f"{len(texts)} completions, beta {model.beta:g}: {out}")
    return 0


# choosing one of N ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choosers:
    """The models and settings with which ``rltrain eval --select`` chooses."""

    prm: str | None = None
    prm_reference: str = NONE
    # of the process reward model; sigmoid(score) weighs votes, so beta must be the one of training
    beta: float | None = None
    aggregate: Mapping[str, Any] = field(default_factory=dict)
    rm: str | None = None
    steps: str = "newline"
    kl_to: str | None = None

    def refuse(self, names: Sequence[str], n: int) -> None:
        """Raises UserError if a selector lacks its model, before any completion is sampled."""
        if "implicit_prm" in names and self.prm is None:
            raise UserError("--select implicit_prm needs --prm MODEL, with --prm-reference and --beta")
        if "rm" in names and self.rm is None:
            raise UserError("--select rm needs --rm MODEL, a reward model with a scalar head")
        if "weighted_majority" in names and self.prm is None and self.rm is None:
            raise UserError(
                "--select weighted_majority weighs votes by a model's scores: name it with --prm or --rm"
            )
        if self.prm is not None and self.beta is None:
            raise UserError(
                "--prm needs --beta, the coefficient that it was trained with (0.05 in the recipes)"
            )
        if names and n < 2:
            raise UserError(
                f"eval.n is {n}: there is nothing to choose from; set eval.n to 16, --set eval.n=16"
            )


def select_command(
    model: str,
    recipe: AnyRecipe,
    names: Sequence[str],
    choosers: Choosers,
    out: Path | None,
    em_inf: float | None = None,
) -> int:
    """``rltrain eval --select``: accuracy of choosing one of N, for N up to 16 and ``eval.n``, with
    the largest KL that choosing can cost.
    """
    sampled = require_sampled(
        recipe,
        "--select samples answers, and this recipe learns from judged completions; name one with rollouts "
        "and rewards",
    )
    _check_choices(model, sampled, names, choosers)
    tokenization, result = evaluate_model(model, sampled, em_inf)
    console = Console(highlight=False)
    show_evaluation(result, console)

    prompts = _samples(result, names)
    metrics: dict[str, float] = {}
    scores = _chooser_scores(choosers, result, tokenization, console) if set(names) & set(_SCORED) else {}
    for name in names:
        chooser_scores = scores.get("rm" if name == "rm" or "prm" not in scores else "prm")
        scored_prompts = prompts
        if chooser_scores is not None:
            scored_prompts = [
                _with_scores(samples, prompt_scores)
                for samples, prompt_scores in zip(prompts, chooser_scores, strict=True)
            ]
        for selection in selections(scored_prompts, name, [n for n in _SIZES if n <= sampled.eval.n]):
            metrics |= selection.metrics()

    if choosers.kl_to is not None:
        metrics |= _measure_kl(model, choosers.kl_to, result, console)
    show_numbers(metrics, console)
    if out is not None:
        write_atomic(out, json.dumps({"model": model, **result.metrics(), **metrics}, indent=2) + "\n")
    return 0


def _check_choices(model: str, recipe: SampledRecipe, names: Sequence[str], choosers: Choosers) -> None:
    """Raises UserError for every mistake that is known before sampling."""
    choosers.refuse(names, recipe.eval.n)
    if choosers.kl_to is not None and recipe.eval.temperature != 1:
        raise UserError(
            "--kl-to measures on samples of the model itself: set eval.temperature to 1, it is "
            f"{recipe.eval.temperature:g}"
        )
    for key, path in (("--prm", choosers.prm), ("--rm", choosers.rm), ("--kl-to", choosers.kl_to)):
        if path is not None:
            _require_same_tokens(model, key, path)
    step_end_finder(choosers.steps)
    if choosers.prm is not None:
        with user_mistakes():
            scorer_tokenization(_process_model(choosers))


def _chooser_scores(
    choosers: Choosers, result: Evaluation, tokenization: Tokenization, console: Console
) -> dict[str, list[list[float]]]:
    """By "prm" and "rm", if the command line names them: a score for every completion of every prompt."""
    scores: dict[str, list[list[float]]] = {}
    if choosers.prm is not None:
        scores["prm"] = _group_by_prompt(
            result, _process_scores(_process_model(choosers), result, choosers.steps, tokenization, console)
        )
    if choosers.rm is not None:
        scores["rm"] = _group_by_prompt(
            result, rewards_of(choosers.rm, _rows(result), tokens_per_micro_batch=16384)
        )
    return scores


def _require_same_tokens(model: str, key: str, path: str) -> None:
    """Raises UserError if the model at ``path`` reads other tokens than ``model`` writes."""
    with user_mistakes():
        require_same_tokens(tokenization_of(Model(path=model), {}).tokenizer, model, key, path)


def _process_model(choosers: Choosers) -> ProcessModel:
    assert choosers.prm is not None and choosers.beta is not None
    return ProcessModel(choosers.prm, choosers.prm_reference, choosers.beta, choosers.aggregate)


def _samples(result: Evaluation, names: Sequence[str]) -> list[Samples]:
    """The samples of each prompt; an ungraded completion counts as wrong.

    Raises UserError if the rewards do not report what a selector needs.
    """
    scores = [score for group in result.groups for score in group.scores if score.ungraded is None]
    if not result.results:
        raise UserError(
            "--select tells right from wrong, which none of reward.functions does; add one that does, such "
            "as math_answer"
        )
    if set(names) & {"majority", "weighted_majority"} and all(score.answer is None for score in scores):
        raise UserError(
            "voting compares answers, which none of reward.functions extracts; add one that does, such as "
            "math_answer"
        )
    return [
        Samples(
            correct=tuple(float(score.ungraded is None and bool(score.correct)) for score in group.scores),
            answers=tuple(score.answer for score in group.scores),
        )
        for group in result.groups
    ]


def _with_scores(samples: Samples, scores: Sequence[float]) -> Samples:
    return Samples(samples.correct, samples.answers, tuple(scores))


def _rows(result: Evaluation) -> TokenRows:
    pairs = [
        (group.prompt.token_ids, completion.token_ids)
        for group in result.groups
        for completion in group.completions
    ]
    return TokenRows(tuple(prompt for prompt, _ in pairs), tuple(completion for _, completion in pairs))


def _group_by_prompt(result: Evaluation, values: Sequence[float]) -> list[list[float]]:
    remaining = iter(values)
    return [[next(remaining) for _ in group.completions] for group in result.groups]


def _process_scores(
    model: ProcessModel, result: Evaluation, steps: str, tokenization: Tokenization, console: Console
) -> list[float]:
    rows = _rows(result)
    find_ends = step_end_finder(steps)
    pairs = zip(rows.prompts, rows.completions, strict=True)
    texts = [text_row(prompt, completion, find_ends, None, tokenization)[0] for prompt, completion in pairs]
    with open_scorer(model, lambda line: console.print(line, markup=False, soft_wrap=True)) as scorer:
        return [row.score for row in scorer.score(texts)]


def _measure_kl(model: str, reference: str, result: Evaluation, console: Console) -> dict[str, float]:
    """KL (nats) of the sampled model from ``reference``, as the mean log-ratio of its own completions,
    and the N whose best-of-N selection costs the same KL.
    """
    scorer_model = ProcessModel(model, reference, 1.0, {"series": "step", "reduction": "sum"})
    rows = _rows(result)
    pairs = zip(rows.prompts, rows.completions, strict=True)
    texts = [TextRow(prompt, completion, (0,) * len(completion), 1) for prompt, completion in pairs]
    with open_scorer(scorer_model, lambda line: console.print(line, markup=False, soft_wrap=True)) as scorer:
        ratios = _group_by_prompt(result, [row.score for row in scorer.score(texts)])
    mean = average_at_k(ratios, seed=stable_hash("bootstrap", len(ratios)))
    metrics = {"eval/kl_to": mean.value, "eval/kl_to_low": mean.low, "eval/kl_to_high": mean.high}
    return metrics | {"eval/kl_to_as_n": n_for_kl(max(mean.value, 0.0))}
