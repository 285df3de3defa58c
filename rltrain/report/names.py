"""Every metric a run may log: its name, unit and what it is taken over. One table; a name that is not in it is refused.

A name is ``stage/quantity``. A trailing ``*`` admits the names that methods and phases choose themselves (the parts of a
loss, the share a control touched, the parts of a reward). Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rltrain.registry import suggestion


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: str  # "1" is a share or a plain ratio
    what: str  # the quantity, its reduction and over what


METRICS: tuple[Metric, ...] = (
    Metric("rollout/completions", "completions", "sampled and trained on in this step, all ranks"),
    Metric("rollout/tokens", "tokens", "sampled in those completions"),
    Metric("rollout/length_mean", "tokens", "mean completion length over the step"),
    Metric("rollout/length_max", "tokens", "longest completion of the step"),
    Metric("rollout/finished_by_length", "1", "share of completions cut at rollout.max_tokens"),
    Metric("rollout/aborted", "1", "share of completions the engine gave up on"),
    Metric("rollout/generated_groups", "groups", "sampled before dynamic sampling dropped any"),
    Metric("rollout/rounds", "rounds", "of dynamic sampling"),
    Metric("rollout/staleness", "versions", "learner's version less the oldest that sampled a completion of the step"),
    Metric("rollout/mismatch_abs", "nats", "mean |learner - engine log-prob| over sampled tokens"),
    Metric("rollout/mismatch_max", "nats", "largest |learner - engine log-prob| over the same"),
    Metric("rollout/mismatch_k3", "nats", "k3 estimate of KL(engine || learner), mean over sampled tokens"),
    Metric("rollout/ratio_p50", "1", "median of learner / engine probability over sampled tokens"),
    Metric("rollout/ratio_p99", "1", "99th percentile of the same"),
    Metric("rollout/ratio_max", "1", "maximum of the same"),
    Metric("rollout/ess", "1", "effective sample size of those ratios, as a share of the sampled tokens"),
    Metric("reward/mean", "reward", "mean over graded completions of the step"),
    Metric("reward/std", "reward", "standard deviation over the same, without Bessel's correction"),
    Metric("reward/min", "reward", "minimum over the same"),
    Metric("reward/max", "reward", "maximum over the same"),
    Metric("reward/useful_groups", "1", "share of groups whose graded rewards are not all equal"),
    Metric("reward/graded", "1", "share of completions with a reward"),
    Metric("reward/correct", "1", "share of graded completions a reward function calls correct"),
    Metric("reward/part/*", "reward", "mean of one named part over the completions that report it"),
    Metric("reward/ungraded/*", "completions", "left ungraded for this reason in the step"),
    Metric("advantage/mean", "1", "mean over the tokens that count"),
    Metric("advantage/abs", "1", "mean magnitude over the same"),
    Metric("advantage/logp_covariance", "nats", "covariance of log-prob and advantage over the same (arXiv:2505.22617)"),
    Metric("control/masked", "1", "share of sampled tokens that a control masked out or gave weight 0"),
    Metric("control/*", "", "what a control reports of itself"),
    Metric("loss/total", "loss", "the optimizer step's loss; not comparable between methods"),
    Metric("loss/*", "", "what a loss or term reports of itself, averaged over the tokens that count"),
    Metric("learner/entropy_mean", "nats", "policy entropy, mean over sampled tokens"),
    Metric("learner/entropy_p10", "nats", "10th percentile of the same"),
    Metric("learner/entropy_p90", "nats", "90th percentile of the same"),
    Metric("learner/tokens", "tokens", "that count in the step's loss"),
    Metric("learner/grad_norm", "1", "before clipping, mean over the step's updates"),
    Metric("learner/lr", "1", "learning rate at the start of the step"),
    Metric("learner/version", "updates", "taken so far; it names the weights"),
    Metric("learner/idle_rows", "completions", "that could not contribute and skipped the gradient pass"),
    Metric("learner/trained_rows", "completions", "run through the gradient pass"),
    Metric("learner/trained_tokens", "tokens", "run through the gradient pass, prompts included"),
    Metric("learner/skipped_updates", "updates", "dropped for a non-finite loss or gradient"),
    Metric("sync/checked", "weights", "whose fingerprints learner and engine compared after the push"),
    Metric("sync/difference", "1", "largest relative difference of those fingerprints; rounding, where it is not 0"),
    Metric("eval/reward", "reward", "mean over graded held-out completions"),
    Metric("eval/tokens", "tokens", "mean held-out completion length"),
    Metric("eval/ungraded", "completions", "held-out, left ungraded"),
    Metric("eval/pass@*", "1", "unbiased pass@k over held-out prompts; _low and _high bound the 95 % bootstrap interval"),
    Metric("eval/avg@*", "1", "mean score over k completions of each held-out prompt; _low and _high as above"),
    Metric("time/step", "s", "wall-clock of the step"),
    Metric("time/tokens_per_second", "tokens/s", "sampled tokens over the step's wall-clock"),
    Metric("time/elapsed", "s", "since the run started or resumed"),
    Metric("time/*", "s", "wall-clock of one phase of the step"),
)

_EXACT = {metric.name: metric for metric in METRICS if not metric.name.endswith("*")}
_PREFIXES = {metric.name[:-1]: metric for metric in METRICS if metric.name.endswith("*")}


def metric(name: str) -> Metric:
    """The table's row for ``name``. Raises ValueError with the nearest name when there is none."""
    if name in _EXACT:
        return _EXACT[name]
    for prefix, row in _PREFIXES.items():
        if name.startswith(prefix) and name != prefix:
            return row
    raise ValueError(f"no metric is called {name!r}{suggestion(name, _EXACT)} New metrics get a row in rltrain/report/names.py")


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError on the first name the table does not have."""
    for name in names:
        metric(name)
