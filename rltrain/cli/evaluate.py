"""``rltrain eval`` and ``rltrain generate``: evaluate or sample a model on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rltrain.build.digests import with_prompt_date
from rltrain.build.inputs import load_inputs
from rltrain.build.local_inputs import require_sampled
from rltrain.build.offline import evaluate_offline
from rltrain.build.rollout import add_model_rewards, build_evaluator, with_token_choice
from rltrain.checkpoint.run_folder import write_atomic
from rltrain.cli.session import joined_processes, sampler_for_model, user_errors
from rltrain.config.schema import AnyRecipe, Data, Model, OfflineRecipe, SampledRecipe
from rltrain.data.chat import render, template_inputs
from rltrain.data.tokenization import Tokenization, load_tokenization
from rltrain.errors import UserError, user_mistakes
from rltrain.process import Process
from rltrain.rollout.colocated import GradedSampler
from rltrain.rollout.groups import sample_groups
from rltrain.round_trip import Losses
from rltrain.train.evaluate import Evaluation
from rltrain.types.samples import Prompt, Sampling


def eval_command(model: str, recipe: AnyRecipe, out: Path | None, em_inf: float | None = None) -> int:
    """``rltrain eval``: measures ``model`` on the recipe's held-out data, prints the numbers and writes them
    to ``out`` as JSON.

    For a recipe with sampled completions: unbiased pass@k. For judged completions: accuracy and margin, with
    the recipe's own model as reference. em_inf: nats to which EM-INF lowers the entropy of each token's
    logits before a token is drawn; None: the logits are unchanged.
    """
    metrics = EVALUATIONS[recipe.kind](model, recipe, em_inf)
    if out is not None:
        write_atomic(out, json.dumps({"model": model, **metrics}, indent=2) + "\n")
    return 0


def _evaluate_offline(model: str, recipe: OfflineRecipe, em_inf: float | None) -> dict[str, float]:
    del em_inf  # no completion is sampled
    recipe = with_prompt_date(recipe)
    with joined_processes(recipe.train.deadline_seconds) as (process, _), user_mistakes():
        metrics = evaluate_offline(model, recipe, process).metrics()
    show_numbers(metrics, Console())
    return metrics


def _evaluate_sampled(model: str, recipe: SampledRecipe, em_inf: float | None) -> dict[str, float]:
    _, result = evaluate_model(model, recipe, em_inf)
    show_evaluation(result, Console())
    return result.metrics()


EVALUATIONS: Mapping[str, Callable[..., dict[str, float]]] = {
    "online": _evaluate_sampled,
    "online_pairs": _evaluate_sampled,
    "offline": _evaluate_offline,
    "sft": _evaluate_offline,
}


def evaluate_model(
    model: str, recipe: SampledRecipe, em_inf: float | None = None, side: Literal["train", "eval"] = "eval"
) -> tuple[Tokenization, Evaluation]:
    """The tokenizer of ``model``, and its completions of the recipe's held-out prompts, graded; with side
    "train" those of its first ``eval.prompts`` training prompts.

    Raises UserError if there are no held-out prompts.
    """
    recipe = with_prompt_date(recipe.model_copy(update={"model": Model(path=model)}))
    rollout = recipe.rollout
    with user_errors(recipe.train.deadline_seconds):
        inputs = load_inputs(recipe)
    if side == "train":
        first = dataclasses.replace(inputs.train, prompts=inputs.train.prompts[: recipe.eval.prompts])
        inputs = dataclasses.replace(inputs, held_out=first)

    with joined_processes(recipe.train.deadline_seconds) as (process, _), inputs.grader:
        if inputs.held_out is None:
            raise UserError("the recipe names no held-out prompts; set data.eval")
        tokens = recipe.learner.tokens_per_micro_batch
        grader = add_model_rewards(recipe.reward, inputs.grader, tokens, process.device, recipe.data.date)
        prompts = inputs.held_out.prompts
        evaluator = build_evaluator(recipe.eval, recipe.reward, rollout.max_tokens, recipe.seed, prompts)
        sampling = _with_em_inf(evaluator.sampling, rollout.engine, em_inf)
        evaluator = dataclasses.replace(evaluator, sampling=sampling)
        single_process = Process(device=process.device, deadline=process.deadline)
        with sampler_for_model(recipe, inputs.tokenization, process) as sampler:
            result = evaluator.evaluate(GradedSampler(sampler, grader, single_process), version=0)
    return inputs.tokenization, result


def generate_command(
    recipe: AnyRecipe,
    prompts: Sequence[str],
    n: int,
    temperature: float,
    em_inf: float | None = None,
    before: str | None = None,
) -> int:
    """``rltrain generate``: prints ``n`` completions of each prompt. The recipe has the model, the engine,
    the lengths and the seed.

    em_inf: as for ``eval_command``. before: a model whose completions are printed beside them.
    """
    sampled = require_sampled(
        recipe,
        "rltrain generate takes engine and lengths from a recipe, and this one learns from judged "
        "completions: drop --recipe",
    )
    sampled = with_prompt_date(sampled)
    console = Console(highlight=False)
    completions = sample_texts(sampled, prompts, n, temperature, em_inf)
    if before is not None:
        model = sampled.model.model_copy(update={"path": before, "revision": None})
        other = sampled.model_copy(update={"model": model})
        show_beside(prompts, sample_texts(other, prompts, n, temperature, em_inf), completions, console)
        return 0
    for text, group in zip(prompts, completions, strict=True):
        console.print(text, style="bold", markup=False)
        for completion in group:
            console.print(f"  {completion}", markup=False)
    return 0


def sample_texts(
    recipe: SampledRecipe, prompts: Sequence[str], n: int, temperature: float, em_inf: float | None
) -> list[list[str]]:
    """``n`` completions of each prompt by the recipe's model."""
    with user_mistakes():
        tokenization = load_tokenization(recipe.model, recipe.data, recipe.rollout)
        rendered = [
            _build_prompt(str(number), text, recipe.data, tokenization) for number, text in enumerate(prompts)
        ]
    sampling = Sampling(n=n, temperature=temperature, max_tokens=recipe.rollout.max_tokens, seed=recipe.seed)
    sampling = with_token_choice(sampling, recipe.eval)
    sampling = _with_em_inf(sampling, recipe.rollout.engine, em_inf)
    with (
        joined_processes(recipe.train.deadline_seconds) as (process, _),
        sampler_for_model(recipe, tokenization, process) as sampler,
    ):
        groups = sample_groups(sampler, rendered, sampling, 0, process.deadline)
    return [[completion.text for completion in group.completions] for group in groups]


def show_beside(
    prompts: Sequence[str],
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    console: Console,
) -> None:
    """Prints what two models answer, a row per pair of completions."""
    table = Table("prompt", "before", "after", box=SIMPLE_HEAD)
    for prompt, earlier, later in zip(prompts, before, after, strict=True):
        for place, pair in enumerate(zip(earlier, later, strict=True)):
            table.add_row(
                Text(prompt if place == 0 else ""), *(Text(" ".join(text.split())) for text in pair)
            )
    console.print(table)


def _with_em_inf(sampling: Sampling, engine: str, em_inf: float | None) -> Sampling:
    """``sampling`` with EM-INF. Raises UserError where EM-INF is impossible."""
    if em_inf is not None and (em_inf <= 0 or engine != "transformers"):
        raise UserError(
            f"--em-inf {em_inf:g} with engine {engine}: it takes a positive number and the engine "
            "transformers"
        )
    return dataclasses.replace(sampling, sharpen_below=em_inf)


def _build_prompt(name: str, text: str, data: Data, tokenization: Tokenization) -> Prompt:
    try:
        content = data.prompt_template.format_map({"prompt": text})
    except KeyError as error:
        raise UserError(
            f"data.prompt_template asks for the column {error}, which a prompt of the command line has not: "
            "write the whole question and leave --recipe out"
        ) from error
    rendered, token_ids = render(
        content,
        tokenization.tokenizer,
        system=data.system,
        chat_template=data.chat_template,
        date=data.date,
        inputs=template_inputs({}, data),
    )
    losses = Losses()
    losses.add(rendered, token_ids, tokenization.tokenizer)
    losses.check(f"prompt {name}", tokenization.tokenizer)
    tokenization.require_embedded([(f"prompt {name}", token_ids)])
    return Prompt(name, tuple(token_ids), rendered)


def show_evaluation(result: Evaluation, console: Console) -> None:
    """Prints the results with their intervals, one per line."""
    estimates = [(f"pass@{estimate.k}", estimate) for estimate in result.results]
    for name, estimate in (*estimates, (f"avg@{result.n}", result.average)):
        console.print(
            f"{name:<8} {estimate.value:.3f}  [{estimate.low:.3f}, {estimate.high:.3f}]", markup=False
        )
    if result.note:
        console.print(result.note, markup=False, soft_wrap=True)
    ungraded = f", {result.ungraded} ungraded" if result.ungraded else ""
    console.print(f"reward   {result.reward:.3f}  over {len(result.groups)} prompts{ungraded}", markup=False)


def show_numbers(metrics: Mapping[str, float], console: Console) -> None:
    """Prints the metrics, one per line, for example ``accuracy 0.612 [0.571, 0.653]``."""
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        bounds = [metrics[key] for key in (f"{name}_low", f"{name}_high") if key in metrics]
        interval = f"  [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
        console.print(f"{name.removeprefix('eval/'):<16} {value:.3f}{interval}", markup=False)
