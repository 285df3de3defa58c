"""What process rewards know of outcomes and of steps, against what needs no reward model: length, position,
likelihood.

    python scripts/measure_process_rewards.py scored.0.jsonl scored.1.jsonl --likelihood policy.jsonl --out
    found.json

Each file is what ``rltrain score`` wrote of the same rows, one per seed. A row says whether the whole is
right (``label``), which steps are (``right``, in order; null where nobody judged) and which problem it
belongs to (``problem``); what a row lacks is not measured. ``--likelihood`` is the same file scored with
``--reference none --beta 1`` by the model that wrote the solutions, and ``--rm NAME=MODEL`` a reward model
with a scalar head that scores the whole. Numbers of single seeds have 95 % bootstrap intervals over problems;
of several seeds the mean is printed, with the bounds averaged: seeds share their rows, so they do not narrow
an interval.
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
    label: bool | None  # whether the whole is right
    right: tuple[bool | None, ...]  # of each step; empty where nobody says
    rewards: tuple[float, ...]  # of each step
    score: float  # of the steps in one number, as the file has it
    lengths: tuple[int, ...]  # characters of each step
    answer: str | None = None  # equal for equal answers

    @property
    def wrong(self) -> int | None:
        """The first wrong step where it is looked for: in solutions of several steps that do not come
        out right all the same.
        """
        return first_wrong(self.right) if len(self.right) > 1 and not self.label else None


def read(path: Path) -> list[Solution]:
    """Rows that were scored. Raises ValueError where a row's labels are not as many as its steps."""
    names: dict[str, int] = {}
    found: list[Solution] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if row["score"] is None:
            continue
        right, rewards = tuple(row.get("right") or ()), tuple(row["step_rewards"])
        if right and len(right) != len(rewards):
            raise ValueError(
                f"{path}, line {number}: {len(right)} labels of {len(rewards)} steps; cut steps as the "
                "labels were made"
            )
        problem = names.setdefault(str(row["problem"]), len(names))
        lengths = tuple(len(text) for text in row["step_texts"])
        found.append(
            Solution(problem, row.get("label"), right, rewards, row["score"], lengths, row.get("answer"))
        )
    return found


# outcomes ---------------------------------------------------------------------------------------------------

OUTCOME: dict[str, Callable[[Solution], float]] = {
    "sum of rewards": lambda one: sum(one.rewards),
    "smallest reward of a step": lambda one: min(one.rewards),
    "mean reward of a step": lambda one: sum(one.rewards) / len(one.rewards),
    "shorter": lambda one: -sum(one.lengths),
    "fewer steps": lambda one: -len(one.lengths),
}
PLAIN = ("shorter", "fewer steps")  # what needs no model


def outcomes(rows: Sequence[Solution], others: Mapping[str, Sequence[float]]) -> Numbers:
    """AUC of every score of the whole against the label; of the first also against the others, and
    inside problems.
    """
    told = [at for at, row in enumerate(rows) if row.label is not None]
    label, cluster = [bool(rows[at].label) for at in told], [rows[at].problem for at in told]
    if len(set(label)) < 2:
        return {}
    scores = {name: [by(rows[at]) for at in told] for name, by in OUTCOME.items()}
    scores |= {name: [values[at] for at in told] for name, values in others.items()}
    found: Numbers = {"outcome/share right": clustered_average(label, cluster, seed=SEED)}
    for name, values in scores.items():
        found[f"outcome/auc/{name}"] = clustered_auc(values, label, cluster, seed=SEED)
        inside = aucs_within_clusters(values, label, cluster)
        if inside:
            found[f"outcome/auc inside problems/{name}"] = average(inside, seed=SEED)
    for name in (*PLAIN, *others):
        for mine in ("sum of rewards", "smallest reward of a step"):
            found[f"outcome/auc/{mine} less {name}"] = auc_difference(
                scores[mine], scores[name], label, cluster, seed=SEED
            )
    return found


# choosing one of N ------------------------------------------------------------------------------------------


def choices(rows: Sequence[Solution], others: Mapping[str, Sequence[float]]) -> Numbers:
    """Accuracy of the best by a score among a problem's solutions and of their vote, and the differences to
    the vote.

    Only where every problem has equally many labelled solutions with answers.
    """
    members: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        members.setdefault(row.problem, []).append(at)
    sizes = {len(at) for at in members.values()}
    if (
        sizes == {1}
        or len(sizes) > 1
        or any(row.label is None for row in rows)
        or all(row.answer is None for row in rows)
    ):
        return {}
    n = sizes.pop()
    scores = {name: [by(row) for row in rows] for name, by in OUTCOME.items() if name not in PLAIN} | dict(
        others
    )
    found = {"vote": [_chosen("majority", rows, at, None, n) for at in members.values()]}
    found["best possible"] = [_chosen("oracle", rows, at, None, n) for at in members.values()]
    found |= {
        name: [_chosen("implicit_prm", rows, at, values, n) for at in members.values()]
        for name, values in scores.items()
    }
    found["vote weighed by the sum"] = [
        _chosen("weighted_majority", rows, at, scores["sum of rewards"], n) for at in members.values()
    ]
    numbers = {f"best of {n}/{name}": average(values, seed=SEED) for name, values in found.items()}
    for name in found.keys() - {"vote", "best possible"}:
        less = [mine - theirs for mine, theirs in zip(found[name], found["vote"], strict=True)]
        numbers[f"best of {n}/{name} less the vote"] = average(less, seed=SEED)
    return numbers


def _chosen(
    selector: str, rows: Sequence[Solution], at: Sequence[int], scores: Sequence[float] | None, n: int
) -> float:
    correct, answers = (
        tuple(float(bool(rows[one].label)) for one in at),
        tuple(rows[one].answer for one in at),
    )
    return SELECTORS[selector](
        Samples(correct, answers, () if scores is None else tuple(scores[one] for one in at)), n
    )


# the first wrong step ---------------------------------------------------------------------------------------


def places(rows: Sequence[Solution]) -> list[float]:
    """For each wrong row whether its first wrong step is where it mostly is in solutions of other
    problems, which are split in halves.
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
    """How often the step of lowest reward is the first wrong one, and how often something simpler is."""
    wrong = [at for at, row in enumerate(rows) if row.wrong is not None]
    cluster = [rows[at].problem for at in wrong]
    if len(set(cluster)) < 2:
        return {}
    hits = {"lowest reward": _hits([rows[at].rewards for at in wrong], rows, wrong)}
    if likelihood is not None:
        hits["least likely step"] = _hits([likelihood[at].rewards for at in wrong], rows, wrong)
    hits |= {
        "chance": [1 / len(rows[at].right) for at in wrong],
        "commonest place": places(rows),
        "first step": [float(rows[at].wrong == 0) for at in wrong],
        "last step": [float(rows[at].wrong == len(rows[at].right) - 1) for at in wrong],
        "longest step": _hits([tuple(-length for length in rows[at].lengths) for at in wrong], rows, wrong),
    }
    found = {
        f"first wrong step/{name}": clustered_average(values, cluster, seed=SEED)
        for name, values in hits.items()
    }
    for name, values in hits.items():
        if name != "lowest reward":
            less = [mine - theirs for mine, theirs in zip(hits["lowest reward"], values, strict=True)]
            found[f"first wrong step/lowest reward less {name}"] = clustered_average(less, cluster, seed=SEED)
    return found


def _hits(values: Sequence[Sequence[float]], rows: Sequence[Solution], wrong: Sequence[int]) -> list[float]:
    found: list[float] = []
    for one, at in zip(values, wrong, strict=True):
        place = rows[at].wrong
        assert place is not None
        found.append(lowest_pick_chance(one, place))
    return found


def steps(rows: Sequence[Solution], likelihood: Sequence[Solution] | None) -> Numbers:
    """AUC of step rewards against the labels of steps, up to the first wrong one: what comes after it is
    judged differently by every data set."""
    right: list[bool] = []
    cluster: list[int] = []
    scores: dict[str, list[float]] = {"reward": [], "earlier": [], "shorter": []}
    if likelihood is not None:
        scores["likelihood"] = []
    for at, row in enumerate(rows):
        upto = len(row.right) if (wrong := first_wrong(row.right)) is None else wrong + 1
        for step in range(upto):
            label = row.right[step]
            if label is None:
                continue
            right.append(label)
            cluster.append(row.problem)
            scores["reward"].append(row.rewards[step])
            scores["earlier"].append(-step)
            scores["shorter"].append(-row.lengths[step])
            if likelihood is not None:
                scores["likelihood"].append(likelihood[at].rewards[step])
    if len(set(right)) < 2:
        return {}
    found = {
        f"steps/auc/{name}": clustered_auc(values, right, cluster, seed=SEED, resamples=1000)
        for name, values in scores.items()
    }
    for name in scores.keys() - {"reward"}:
        found[f"steps/auc/reward less {name}"] = auc_difference(
            scores["reward"], scores[name], right, cluster, seed=SEED, resamples=1000
        )
    return found


# files ------------------------------------------------------------------------------------------------------


def measured(file: Path, likelihood: Path | None, heads: Mapping[str, str]) -> Numbers:
    """Everything that the rows of ``file`` allow to say."""
    rows, judge = read(file), None if likelihood is None else read(likelihood)
    if judge is not None and len(judge) != len(rows):
        raise ValueError(
            f"{likelihood} has {len(judge)} rows, {file} {len(rows)}; score the same file with both"
        )
    others = {} if judge is None else {"likelihood": [sum(row.rewards) for row in judge]}
    others |= {name: head_scores(model, file) for name, model in heads.items()}
    return outcomes(rows, others) | choices(rows, others) | localisation(rows, judge) | steps(rows, judge)


def head_scores(model: str, file: Path) -> list[float]:
    """What a reward model with a scalar head says of each row that was scored."""
    from rltrain.config.schema import JudgedData, Model
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
            spelt, token_ids = reader.encode_prompt(row["prompt"])
            prompts.append(token_ids)
            completions.append(reader.encode_completion(row["prompt"], spelt, row["completion"]))
    return rewards_of(model, TokenRows(tuple(prompts), tuple(completions)), tokens_per_micro_batch=8192)


def over_seeds(found: Sequence[Numbers]) -> dict[str, dict[str, Any]]:
    """Means, with the bounds averaged, and every seed's number."""
    together: dict[str, dict[str, Any]] = {}
    for name in found[0]:
        each = [one[name] for one in found]
        low, high, value = (
            sum(getattr(one, key) for one in each) / len(each) for key in ("low", "high", "value")
        )
        together[name] = {
            "value": value,
            "low": low,
            "high": high,
            "problems": each[0].prompts,
            "seeds": [one.value for one in each],
        }
    return together


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scored", nargs="+", type=Path, help="what rltrain score wrote, one file per seed")
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
    found = over_seeds([measured(file, options.likelihood, heads) for file in options.scored])
    for name, one in found.items():
        seeds = f"  ({', '.join(f'{value:.3f}' for value in one['seeds'])})" if len(one["seeds"]) > 1 else ""
        print(f"{name:<60} {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]{seeds}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
