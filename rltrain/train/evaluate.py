"""Unbiased pass@k and avg@k on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rltrain.report.statistics import Estimate, PassAtK, average, average_at_k, pass_at_k
from rltrain.rollout.grading import correctness
from rltrain.rollout.source import Evaluates
from rltrain.rollout.verdicts import why_unknown, with_verdicts
from rltrain.seeds import stable_hash
from rltrain.types.samples import Prompt, Sampling, ScoredGroup


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, with every completion that was graded for it."""

    results: tuple[PassAtK, ...]  # empty where no reward says what is correct
    # avg@n: mean correctness of a prompt's n completions, or mean reward where correctness is unknown
    average: Estimate
    n: int  # completions per prompt
    reward: float  # mean value over graded completions
    tokens: float  # mean completion tokens
    ungraded: int
    groups: tuple[ScoredGroup, ...]
    note: str = ""  # why there is no pass@k, where there is none

    def metrics(self) -> dict[str, float]:
        found = {
            "eval/reward": self.reward,
            "eval/tokens": self.tokens,
            "eval/ungraded": float(self.ungraded),
        }
        named = [(f"eval/pass@{result.k}", result) for result in self.results]
        for name, estimate in (*named, (f"eval/avg@{self.n}", self.average)):
            found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return found


@dataclass(frozen=True)
class Evaluator:
    """Samples and grades the same held-out prompts with the same seed each time, so that evaluations
    are comparable.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    k: tuple[int, ...]
    verdict_of: str | None = (
        None  # the only reward, a user's function: its scores of 0 and 1 say what is correct
    )

    def evaluate(self, source: Evaluates, version: int) -> Evaluation:
        """All ranks return the same result."""
        occasion = f"held-out prompts after {version} updates"
        groups = source.evaluate(self.prompts, self.sampling, version, occasion)
        result = summarise(with_verdicts(groups, self.verdict_of), self.sampling.n, self.k)
        return (
            result
            if result.results or not self.k
            else replace(result, note=why_unknown(groups, self.verdict_of))
        )


def summarise(groups: Sequence[ScoredGroup], n: int, k: tuple[int, ...]) -> Evaluation:
    """pass@k where the rewards say what is correct; an ungraded completion counts as wrong, it showed
    no right answer.
    """
    verdicts = [correctness(group) for group in groups]
    known = all(right is not None for right in verdicts)
    counts = [sum(right) for right in verdicts if right is not None]
    values = [[score.value for score in group.scores if score.ungraded is None] for group in groups]
    scores = [score for group in groups for score in group.scores]
    graded = [score.value for score in scores if score.ungraded is None]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    seed = stable_hash("bootstrap", len(groups), n)
    share = (
        average([count / n for count in counts], seed=seed)
        if known
        else average_at_k([one for one in values if one], seed=seed)
    )
    return Evaluation(
        results=tuple(pass_at_k(counts, n, one, seed=seed) for one in k) if known else (),
        average=share,
        n=n,
        reward=sum(graded) / max(len(graded), 1),
        tokens=sum(lengths) / len(lengths),
        ungraded=len(scores) - len(graded),
        groups=tuple(groups),
    )
