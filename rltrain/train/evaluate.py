"""Unbiased pass@k and avg@k on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rltrain.report.statistics import Estimate, PassAtK, average, average_at_k, pass_at_k
from rltrain.rollout.grading import correctness
from rltrain.rollout.source import EvaluationSource
from rltrain.rollout.verdicts import add_verdicts, why_unknown
from rltrain.seeds import stable_hash
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Prompt, Sampling, ScoredGroup


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation, with every completion that was graded for it."""

    results: tuple[PassAtK, ...]  # empty where no reward says what is correct
    # avg@n: mean correctness of a prompt's n completions, or mean reward where correctness is unknown
    average: Estimate
    n: int  # completions per prompt
    reward: float  # mean value over graded completions
    tokens: float  # mean completion tokens
    ungraded: int
    groups: tuple[ScoredGroup, ...]
    note: str = ""  # the reason, where there is no pass@k
    spectrum: Mapping[str, float] = field(default_factory=dict)  # metrics of the policy's hidden states

    def metrics(self) -> dict[str, float]:
        metrics = {
            "eval/reward": self.reward,
            "eval/tokens": self.tokens,
            "eval/ungraded": float(self.ungraded),
            **self.spectrum,
        }
        estimates = [(f"eval/pass@{result.k}", result) for result in self.results]
        for name, estimate in (*estimates, (f"eval/avg@{self.n}", self.average)):
            metrics |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return metrics


@dataclass(frozen=True)
class Evaluator:
    """Samples and grades the same held-out prompts with the same seed each time, so that evaluations are
    comparable.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    k: tuple[int, ...]
    # label of the only reward if it is a user's function: its scores of 0 and 1 say what is correct
    verdict_of: str | None = None
    versions: frozenset[int] | None = None  # the only ones that are evaluated, in a replay; None: any

    def evaluate(self, source: EvaluationSource, version: int) -> Evaluation:
        """All ranks return the same result."""
        occasion = f"held-out prompts after {version} updates"
        groups = source.evaluate(self.prompts, self.sampling, version, occasion)
        result = summarise(add_verdicts(groups, self.verdict_of), self.sampling.n, self.k)
        if result.results or not self.k:
            return result
        return replace(result, note=why_unknown(groups, self.verdict_of))


def first_completions(groups: Sequence[ScoredGroup]) -> TokenRows:
    """Each prompt with its first completion that is not empty; prompts without one are left out."""
    rows = [
        (group.prompt.token_ids, written[0].token_ids)
        for group in groups
        if (written := [completion for completion in group.completions if completion.token_ids])
    ]
    return TokenRows(tuple(prompt for prompt, _ in rows), tuple(completion for _, completion in rows))


def summarise(groups: Sequence[ScoredGroup], n: int, k: tuple[int, ...]) -> Evaluation:
    """pass@k where the rewards say what is correct. An ungraded completion counts as wrong, because it showed
    no correct answer.
    """
    verdicts = [correctness(group) for group in groups]
    is_known = all(verdict is not None for verdict in verdicts)
    counts = [sum(verdict) for verdict in verdicts if verdict is not None]
    values = [[score.value for score in group.scores if score.ungraded is None] for group in groups]

    scores = [score for group in groups for score in group.scores]
    graded = [score.value for score in scores if score.ungraded is None]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]

    seed = stable_hash("bootstrap", len(groups), n)
    if is_known:
        mean = average([count / n for count in counts], seed=seed)
    else:
        mean = average_at_k([rewards for rewards in values if rewards], seed=seed)
    return Evaluation(
        results=tuple(pass_at_k(counts, n, size, seed=seed) for size in k) if is_known else (),
        average=mean,
        n=n,
        reward=sum(graded) / max(len(graded), 1),
        tokens=sum(lengths) / len(lengths),
        ungraded=len(scores) - len(graded),
        groups=tuple(groups),
    )
