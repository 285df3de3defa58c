"""Measures what process rewards know about outcomes and steps, compared with signals that need no reward
model: length, position, likelihood.

    python scripts/measure_process_rewards.py scored.0.jsonl scored.1.jsonl
        --likelihood policy.jsonl --out found.json

Each file is the output of ``rltrain score`` for the same rows, one file per seed. A row says whether the
solution is right (``label``), which steps are right (``right``, in order; null without a verdict) and which
problem it belongs to (``problem``); numbers whose columns are absent are not measured. ``--likelihood`` is
the same file scored with ``--reference none --beta 1`` by the model that wrote the solutions. ``--rm
NAME=MODEL`` is a reward model with a scalar head that scores whole solutions. Numbers of a single seed have
95 % bootstrap intervals over problems; for several seeds the mean is printed with averaged bounds: the seeds
share their rows, so they do not narrow an interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rltrain.analysis.first_error import (
    auc_difference,
    aucs_within_clusters,
    clustered_auc,
    commonest_place,
    first_wrong,
    lowest_pick_chance,
)
from rltrain.analysis.selection import SELECTORS, Samples
from rltrain.report.statistics import Estimate, average, clustered_average
from rltrain.seeds import stable_hash

Numbers = dict[str, Estimate]
SEED = stable_hash("bootstrap")


class Solution(NamedTuple):
    """One scored completion."""

    problem: int
    label: bool | None  # whether the solution is right
    right: tuple[bool | None, ...]  # of each step; empty without step labels
    rewards: tuple[float, ...]  # of each step
    score: float  # of the solution, as in the file
    lengths: tuple[int, ...]  # characters of each step
    answer: str | None = None  # equal for equal answers

    @property
    def wrong(self) -> int | None:
        """The first wrong step, for solutions of several steps that are not right in the end; else None."""
        return first_wrong(self.right) if len(self.right) > 1 and not self.label else None


def read(path: Path) -> list[Solution]:
    """The scored rows. Raises ValueError if a row has not as many step labels as steps."""
    names: dict[str, int] = {}
    solutions: list[Solution] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if row["score"] is None:
            continue
        right = tuple(row.get("right") or ())
        rewards = tuple(row["step_rewards"])
        if right and len(right) != len(rewards):
            raise ValueError(
                f"{path}, line {number}: {len(right)} labels of {len(rewards)} steps; cut steps as the "
                "labels were made"
            )
        problem = names.setdefault(str(row["problem"]), len(names))
        lengths = tuple(len(text) for text in row["step_texts"])
        solutions.append(
            Solution(problem, row.get("label"), right, rewards, row["score"], lengths, row.get("answer"))
        )
    return solutions


# outcomes ---------------------------------------------------------------------------------------------------

OUTCOME: dict[str, Callable[[Solution], float]] = {
    "sum of rewards": lambda solution: sum(solution.rewards),
    "smallest reward of a step": lambda solution: min(solution.rewards),
    "mean reward of a step": lambda solution: sum(solution.rewards) / len(solution.rewards),
    "shorter": lambda solution: -sum(solution.lengths),
    "fewer steps": lambda solution: -len(solution.lengths),
}
PLAIN = ("shorter", "fewer steps")  # scores that need no model


def outcomes(rows: Sequence[Solution], others: Mapping[str, Sequence[float]]) -> Numbers:
    """AUC of every solution score against the label, over all solutions and inside problems; and the first
    two scores' differences from those without a process reward model.
    """
    labelled = [index for index, row in enumerate(rows) if row.label is not None]
    label = [bool(rows[index].label) for index in labelled]
    cluster = [rows[index].problem for index in labelled]
    if len(set(label)) < 2:
        return {}
    scores = {name: [by(rows[index]) for index in labelled] for name, by in OUTCOME.items()}
    scores |= {name: [values[index] for index in labelled] for name, values in others.items()}
    numbers: Numbers = {"outcome/share right": clustered_average(label, cluster, seed=SEED)}
    for name, values in scores.items():
        numbers[f"outcome/auc/{name}"] = clustered_auc(values, label, cluster, seed=SEED)
        values_inside = aucs_within_clusters(values, label, cluster)
        if values_inside:
            numbers[f"outcome/auc inside problems/{name}"] = average(values_inside, seed=SEED)
    for name in (*PLAIN, *others):
        for score in ("sum of rewards", "smallest reward of a step"):
            numbers[f"outcome/auc/{score} less {name}"] = auc_difference(
                scores[score], scores[name], label, cluster, seed=SEED
            )
    return numbers


# choosing one of N ------------------------------------------------------------------------------------------


def choices(rows: Sequence[Solution], others: Mapping[str, Sequence[float]]) -> Numbers:
    """Accuracy of each problem's best-scored solution and of its vote, and the differences from the vote.

    Empty unless every problem has the same number, above one, of labelled solutions, with answers.
    """
    members: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row.problem, []).append(index)
    sizes = {len(indices) for indices in members.values()}
    if (
        sizes == {1}
        or len(sizes) > 1
        or any(row.label is None for row in rows)
        or all(row.answer is None for row in rows)
    ):
        return {}
    n = sizes.pop()
    scores = {name: [by(row) for row in rows] for name, by in OUTCOME.items() if name not in PLAIN}
    scores |= others
    accuracies = {
        "vote": [_selection_accuracy("majority", rows, indices, None, n) for indices in members.values()]
    }
    accuracies["best possible"] = [
        _selection_accuracy("oracle", rows, indices, None, n) for indices in members.values()
    ]
    accuracies |= {
        name: [_selection_accuracy("implicit_prm", rows, indices, values, n) for indices in members.values()]
        for name, values in scores.items()
    }
    accuracies["vote weighed by the sum"] = [
        _selection_accuracy("weighted_majority", rows, indices, scores["sum of rewards"], n)
        for indices in members.values()
    ]
    numbers = {f"best of {n}/{name}": average(values, seed=SEED) for name, values in accuracies.items()}
    for name in accuracies.keys() - {"vote", "best possible"}:
        differences = [
            accuracy - vote_accuracy
            for accuracy, vote_accuracy in zip(accuracies[name], accuracies["vote"], strict=True)
        ]
        numbers[f"best of {n}/{name} less the vote"] = average(differences, seed=SEED)
    return numbers


def _selection_accuracy(
    selector: str, rows: Sequence[Solution], indices: Sequence[int], scores: Sequence[float] | None, n: int
) -> float:
    samples = Samples(
        correct=tuple(float(bool(rows[index].label)) for index in indices),
        answers=tuple(rows[index].answer for index in indices),
        scores=() if scores is None else tuple(scores[index] for index in indices),
    )
    return SELECTORS[selector](samples, n)


# the first wrong step ---------------------------------------------------------------------------------------


def places(rows: Sequence[Solution]) -> list[float]:
    """For each wrong row, whether its first wrong step is at the most frequent place in solutions of the
    other half of the problems.
    """
    halves = [
        [(len(row.right), row.wrong) for row in rows if row.wrong is not None and row.problem % 2 == half]
        for half in (0, 1)
    ]
    return [
        float(commonest_place(halves[1 - row.problem % 2], len(row.right)) == row.wrong)
        for row in rows
        if row.wrong is not None
    ]


def localisation(rows: Sequence[Solution], likelihood: Sequence[Solution] | None) -> Numbers:
    """How often the step of lowest reward is the first wrong step, and how often simpler guesses are."""
    wrong_rows = [index for index, row in enumerate(rows) if row.wrong is not None]
    cluster = [rows[index].problem for index in wrong_rows]
    if len(set(cluster)) < 2:
        return {}
    hits = {"lowest reward": _hits([rows[index].rewards for index in wrong_rows], rows, wrong_rows)}
    if likelihood is not None:
        hits["least likely step"] = _hits(
            [likelihood[index].rewards for index in wrong_rows], rows, wrong_rows
        )
    hits |= {
        "chance": [1 / len(rows[index].right) for index in wrong_rows],
        "commonest place": places(rows),
        "first step": [float(rows[index].wrong == 0) for index in wrong_rows],
        "last step": [float(rows[index].wrong == len(rows[index].right) - 1) for index in wrong_rows],
        "longest step": _hits(
            [tuple(-length for length in rows[index].lengths) for index in wrong_rows], rows, wrong_rows
        ),
    }
    numbers = {
        f"first wrong step/{name}": clustered_average(values, cluster, seed=SEED)
        for name, values in hits.items()
    }
    for name, values in hits.items():
        if name != "lowest reward":
            differences = [
                hit - other_hit for hit, other_hit in zip(hits["lowest reward"], values, strict=True)
            ]
            numbers[f"first wrong step/lowest reward less {name}"] = clustered_average(
                differences, cluster, seed=SEED
            )
    return numbers


def _hits(
    values: Sequence[Sequence[float]], rows: Sequence[Solution], wrong_rows: Sequence[int]
) -> list[float]:
    chances: list[float] = []
    for step_values, index in zip(values, wrong_rows, strict=True):
        place = rows[index].wrong
        assert place is not None
        chances.append(lowest_pick_chance(step_values, place))
    return chances


def steps(rows: Sequence[Solution], likelihood: Sequence[Solution] | None) -> Numbers:
    """AUC of step rewards against step labels, up to the first wrong step: data sets label later steps
    differently.
    """
    right: list[bool] = []
    cluster: list[int] = []
    scores: dict[str, list[float]] = {"reward": [], "earlier": [], "shorter": []}
    if likelihood is not None:
        scores["likelihood"] = []
    for index, row in enumerate(rows):
        count = len(row.right) if (wrong := first_wrong(row.right)) is None else wrong + 1
        for step in range(count):
            label = row.right[step]
            if label is None:
                continue
            right.append(label)
            cluster.append(row.problem)
            scores["reward"].append(row.rewards[step])
            scores["earlier"].append(-step)
            scores["shorter"].append(-row.lengths[step])
            if likelihood is not None:
                scores["likelihood"].append(likelihood[index].rewards[step])
    if len(set(right)) < 2:
        return {}
    numbers = {
        f"steps/auc/{name}": clustered_auc(values, right, cluster, seed=SEED, resamples=1000)
        for name, values in scores.items()
    }
    for name in scores.keys() - {"reward"}:
        numbers[f"steps/auc/reward less {name}"] = auc_difference(
            scores["reward"], scores[name], right, cluster, seed=SEED, resamples=1000
        )
    return numbers


# files ------------------------------------------------------------------------------------------------------


def measure_file(file: Path, likelihood: Path | None, heads: Mapping[str, str]) -> Numbers:
    """All numbers that the rows of ``file`` allow."""
    rows = read(file)
    judge = None if likelihood is None else read(likelihood)
    if judge is not None and len(judge) != len(rows):
        raise ValueError(
            f"{likelihood} has {len(judge)} rows, {file} {len(rows)}; score the same file with both"
        )
    others = {} if judge is None else {"likelihood": [sum(row.rewards) for row in judge]}
    others |= {name: head_scores(model, file) for name, model in heads.items()}
    return outcomes(rows, others) | choices(rows, others) | localisation(rows, judge) | steps(rows, judge)


def head_scores(model: str, file: Path) -> list[float]:
    """The score that a reward model with a scalar head gives to each scored row."""
    from rltrain.config.schema import JudgedData, Model
    from rltrain.data.chat import template_inputs
    from rltrain.data.judged import Reader
    from rltrain.data.tokenization import tokenization_of
    from rltrain.learner.reward_model import rewards_of
    from rltrain.types.policy import TokenRows

    tokenization = tokenization_of(Model(path=model), {})
    reader = Reader(tokenization.tokenizer, tokenization.stop_tokens.stop, JudgedData(train=str(file)))
    prompts: list[tuple[int, ...]] = []
    completions: list[tuple[int, ...]] = []
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        if row["score"] is not None:
            inputs = template_inputs(row, reader.data)
            spelt, token_ids = reader.encode_prompt(row["prompt"], inputs)
            prompts.append(token_ids)
            completions.append(reader.encode_completion(row["prompt"], spelt, row["completion"], inputs))
    return rewards_of(model, TokenRows(tuple(prompts), tuple(completions)), tokens_per_micro_batch=8192)


def average_seeds(runs: Sequence[Numbers]) -> dict[str, dict[str, Any]]:
    """Means with averaged bounds, and every seed's number."""
    means: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        estimates = [estimate[name] for estimate in runs]
        low, high, value = (
            sum(getattr(estimate, key) for estimate in estimates) / len(estimates)
            for key in ("low", "high", "value")
        )
        means[name] = {
            "value": value,
            "low": low,
            "high": high,
            "problems": estimates[0].prompts,
            "seeds": [estimate.value for estimate in estimates],
        }
    return means


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scored", nargs="+", type=Path, help="output of rltrain score, one file per seed")
    parser.add_argument(
        "--likelihood",
        type=Path,
        help="the same rows scored by their own writer with --reference none --beta 1",
    )
    parser.add_argument(
        "--rm", action="append", default=[], metavar="NAME=MODEL", help="a reward model with a scalar head"
    )
    parser.add_argument("--out", type=Path, help="write the numbers to this file, as JSON")
    options = parser.parse_args(arguments)
    heads = {name: model for name, _, model in (text.partition("=") for text in options.rm)}
    numbers = average_seeds([measure_file(file, options.likelihood, heads) for file in options.scored])
    for name, entry in numbers.items():
        seeds = (
            f"  ({', '.join(f'{value:.3f}' for value in entry['seeds'])})" if len(entry["seeds"]) > 1 else ""
        )
        print(f"{name:<60} {entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]{seeds}")
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
