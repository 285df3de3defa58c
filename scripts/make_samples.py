"""Samples a model on a recipe's training prompts and writes the graded completions as rows that other recipes
learn from.

    python scripts/make_samples.py MODEL --recipe RECIPE --as FORM --out FILE [--n 8] [--prompts 1000] \
        [--set KEY=VALUE ...]

RECIPE is of ``kind: online``; it has the prompts, the engine, the lengths and the reward functions. Forms:

- ``labels``: prompt, completion, label (1 if it is right); a row for each graded completion.
- ``pass_rate``: prompt, completion, pass_rate (the share of right completions); the completion is the data
  set's own, in the column that ``--solution`` names. For ``dco_pass_rate``.
- ``answers``: prompt, answer (the first right completion). For ``paced``, whose MODEL is the teacher.
- ``pairs``: prompt, chosen, rejected: the completions of the highest and the lowest reward. For ``inpo``.
- ``graded_pairs``: prompt, chosen, rejected, score_chosen, score_rejected: the completions two by two, in the
  order in which they were drawn, except pairs of equal rewards. For ``mmpo``.
- ``probabilities``: ``pairs`` with p_chosen = sigmoid((reward of chosen - reward of rejected) / ``--scale``),
  which for the rewards of a Bradley-Terry model is its probability. For ``osp``, ``sppo_soft`` and
  ``bradley_terry_soft``.

Prompts without such a row (all completions ungraded, none right, all rewards equal) are counted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rltrain.cli.evaluate import evaluate_model
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.data.prompts import load_rows
from rltrain.types.samples import ScoredGroup

Row = dict[str, Any]


def read_scores(group: ScoredGroup) -> list[tuple[str, float, bool]]:
    """(text, reward, whether it is right) of each graded completion. Raises ValueError if no reward function
    says what is right.
    """
    scored = []
    for completion, score in zip(group.completions, group.scores, strict=True):
        if score.ungraded is None:
            if score.correct is None:
                raise ValueError("no reward function of the recipe says which completions are right")
            scored.append((completion.text, score.value, score.correct))
    return scored


def read_rewards(group: ScoredGroup) -> list[tuple[float, str]]:
    """(reward, text) of each graded completion."""
    return [
        (score.value, completion.text)
        for completion, score in zip(group.completions, group.scores, strict=True)
        if score.ungraded is None
    ]


def labels(group: ScoredGroup, arguments: argparse.Namespace) -> Iterator[Row]:
    del arguments
    for text, _, is_right in read_scores(group):
        yield {"completion": text, "label": int(is_right)}


def pass_rate(group: ScoredGroup, arguments: argparse.Namespace) -> Iterator[Row]:
    if arguments.solution not in group.prompt.columns:
        raise ValueError(
            f"--solution {arguments.solution}: the data has the columns {sorted(group.prompt.columns)}"
        )
    if verdicts := [is_right for _, _, is_right in read_scores(group)]:
        solution = group.prompt.columns[arguments.solution]
        yield {"completion": solution, "pass_rate": sum(verdicts) / len(verdicts)}


def answers(group: ScoredGroup, arguments: argparse.Namespace) -> Iterator[Row]:
    del arguments
    for text, _, is_right in read_scores(group):
        if is_right:
            yield {"answer": text}
            return


def pairs(group: ScoredGroup, arguments: argparse.Namespace) -> Iterator[Row]:
    for row in probabilities(group, arguments):
        yield {name: row[name] for name in ("chosen", "rejected")}


def graded_pairs(group: ScoredGroup, arguments: argparse.Namespace) -> Iterator[Row]:
    del arguments
    scored = read_rewards(group)
    for first, second in zip(scored[::2], scored[1::2], strict=False):
        worse, better = sorted((first, second), key=lambda pair: pair[0])
        if better[0] > worse[0]:
            yield {
                "chosen": better[1],
                "rejected": worse[1],
                "score_chosen": better[0],
                "score_rejected": worse[0],
            }


def probabilities(group: ScoredGroup, arguments: argparse.Namespace) -> Iterator[Row]:
    scored = read_rewards(group)
    if not scored:
        return
    best = max(scored, key=lambda pair: pair[0])
    worst = min(scored, key=lambda pair: pair[0])
    if best[0] > worst[0]:
        probability = 1 / (1 + math.exp(-(best[0] - worst[0]) / arguments.scale))
        yield {"chosen": best[1], "rejected": worst[1], "p_chosen": probability}


FORMS: dict[str, Callable[[ScoredGroup, argparse.Namespace], Iterator[Row]]] = {
    "labels": labels,
    "pass_rate": pass_rate,
    "answers": answers,
    "pairs": pairs,
    "graded_pairs": graded_pairs,
    "probabilities": probabilities,
}


def make_rows(recipe: OnlineRecipe, arguments: argparse.Namespace) -> tuple[list[Row], int]:
    """The rows of every prompt, and the number of prompts without one."""
    _, rows, contents, _ = load_rows(recipe.data, "train")
    prompts = {row.id: content for row, content in zip(rows, contents, strict=True)}
    _, result = evaluate_model(arguments.model, recipe, side="train")
    made: list[Row] = []
    empty = 0
    for group in result.groups:
        of_group = list(FORMS[arguments.form](group, arguments))
        made += [{"prompt": prompts[group.prompt.id], **row} for row in of_group]
        empty += not of_group
    return made, empty


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--as", dest="form", choices=sorted(FORMS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile")
    parser.add_argument("--n", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompts", type=int, default=1000, help="at most this many, the first ones")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--solution", default="solution", help="pass_rate: the column of the solution")
    parser.add_argument("--scale", type=float, default=1.0, help="probabilities: what rewards are divided by")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    sizes = [f"eval.n={arguments.n}", f"eval.prompts={arguments.prompts}", "eval.k=[1]"]
    sizes.append(f"eval.temperature={arguments.temperature}")
    recipe = check(
        load_recipe(arguments.recipe, profile=arguments.profile, overrides=[*sizes, *arguments.settings])
    ).recipe
    if not isinstance(recipe, OnlineRecipe):
        raise SystemExit(
            f"{arguments.recipe} samples no completions that are graded; name one of kind: online"
        )
    rows, empty = make_rows(recipe, arguments)
    write_rows(arguments.out, rows)
    print(f"{arguments.out}: {len(rows)} rows; {empty} prompts have none")


if __name__ == "__main__":
    main()
