"""The table of all metrics that a run may log, with unit and definition; other names are refused.

A name is ``stage/quantity``. A trailing ``*`` admits names that methods and phases choose themselves (the
parts of a loss, the share of tokens that a control changed, the parts of a reward). Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.registry import suggestion


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: str  # "1" is a share or a plain ratio
    what: str  # the quantity, its reduction and the set it is reduced over


METRICS: tuple[Metric, ...] = (
    Metric("rollout/completions", "completions", "sampled and trained on in this step, all ranks"),
    Metric(
        "rollout/tokens",
        "tokens",
        "sampled in those completions, without an environment's observations",
    ),
    Metric("rollout/length_mean", "tokens", "mean completion length over the step"),
    Metric("rollout/length_max", "tokens", "longest completion of the step"),
    Metric("rollout/finished_by_length", "1", "share of completions cut at rollout.max_tokens"),
    Metric("rollout/aborted", "1", "share of completions that the engine or a failed environment aborted"),
    Metric("rollout/generated_groups", "groups", "sampled before dynamic sampling dropped any"),
    Metric("rollout/rounds", "rounds", "rounds of dynamic sampling"),
    Metric("pool/workers", "workers", "that serve when the step's completions are there"),
    Metric("pool/outstanding_tokens", "tokens", "most that were asked for and not yet written, as estimated"),
    Metric("pool/strikes", "answers", "of workers, refused in this step"),
    Metric("pool/redispatched", "requests", "asked again because their worker was lost, busy or refused"),
    Metric("pool/restarts", "workers", "that came back in this step"),
    Metric("pool/lost", "workers", "lost in this step"),
    Metric(
        "rollout/source_*",
        "",
        "rows of each source other than the policy: completions, tokens, mean reward, share correct",
    ),
    Metric("rollout/turns_mean", "turns", "the policy's turns in an episode, mean over the step"),
    Metric("rollout/turns_max", "turns", "the policy's turns in an episode, maximum over the step"),
    Metric(
        "rollout/observed_mean",
        "tokens",
        "tokens that the environment wrote between the turns of an episode, mean over the step",
    ),
    Metric(
        "rollout/environment_failures",
        "completions",
        "left ungraded because their environment failed or took too long",
    ),
    Metric(
        "rollout/environment/*",
        "",
        "numbers that an environment reports (tool calls, moves), mean over episodes that did not fail",
    ),
    Metric(
        "staleness/mean",
        "versions",
        "with rollout.schedule lag or bounded, age of a sampled token: learner's version minus its own",
    ),
    Metric("staleness/max", "versions", "age of the oldest token of the step"),
    Metric("staleness/oldest", "versions", "age of a completion's oldest token, mean over completions"),
    Metric(
        "staleness/mixed",
        "completions",
        "with rollout.schedule bounded, share with tokens of several versions",
    ),
    Metric("staleness/dropped_groups", "groups", "too old for the step, and given up"),
    Metric("staleness/outstanding_groups", "groups", "asked for or there, after the step has taken its own"),
    Metric("staleness/ratio_mass@*", "1", "mean of learner / engine probability over the tokens of this age"),
    Metric(
        "rollout/mass_cut",
        "probability",
        "mean probability of the tokens that truncated sampling dropped, over sampled tokens",
    ),
    Metric(
        "rollout/mismatch_abs",
        "nats",
        "mean |learner - engine log-prob| over sampled tokens; over the rows of one update if no pass reads "
        "all rows before the first update",
    ),
    Metric(
        "rollout/worker_mismatch/*",
        "nats",
        "mean |learner - engine log-prob| over the completions of one of several workers; over a seeded 1 % "
        "of them, at least one, if no pass reads all rows before the first update",
    ),
    Metric("rollout/mismatch_max", "nats", "largest |learner - engine log-prob| over the same"),
    Metric("rollout/mismatch_k3", "nats", "k3 estimate of KL(engine || learner), mean over sampled tokens"),
    Metric("rollout/ratio_p50", "1", "median of learner / engine probability over sampled tokens"),
    Metric("rollout/ratio_p99", "1", "99th percentile of the same"),
    Metric("rollout/ratio_max", "1", "maximum of the same"),
    Metric("rollout/ess", "1", "effective sample size of those ratios, as a share of the sampled tokens"),
    Metric("rollout/ratio_mean", "1", "mean of those ratios: 1 where both policies are the same"),
    Metric(
        "rollout/ess_completions",
        "1",
        "effective sample size of the ratios of whole completions, as a share of the completions",
    ),
    Metric("reward/mean", "reward", "mean over graded completions of the step"),
    Metric("reward/std", "reward", "standard deviation over the same, without Bessel's correction"),
    Metric("reward/min", "reward", "minimum over the same"),
    Metric("reward/max", "reward", "maximum over the same"),
    Metric("reward/useful_groups", "1", "share of groups whose graded rewards are not all equal"),
    Metric("reward/graded", "1", "share of completions with a reward"),
    Metric("reward/correct", "1", "share of graded completions that a reward function calls correct"),
    Metric("reward/part/*", "reward", "mean of one named part over the completions that have it"),
    Metric("reward/ungraded/*", "completions", "left ungraded for this reason in the step"),
    Metric("pairs/count", "pairs", "pairs of completions trained on in this step, all ranks"),
    Metric("pairs/prompts", "1", "share of the step's prompts that have a pair"),
    Metric("pairs/compared", "comparisons", "comparisons that the judge was asked for"),
    Metric("pairs/tied", "pairs", "left out because the judge is not sure enough"),
    Metric("pairs/identical", "pairs", "left out because the token ids are equal"),
    Metric("pairs/unjudged", "pairs", "left out because the judge gave no verdict"),
    Metric("pairs/p_chosen", "1", "the judge's probability that chosen is better, mean over pairs"),
    Metric("pairs/reward_margin", "reward", "reward of chosen minus reward of rejected, mean over pairs"),
    Metric("pairs/chosen_longer", "1", "share of pairs whose chosen completion has more tokens"),
    Metric("advantage/mean", "1", "mean over the tokens that count"),
    Metric("advantage/abs", "1", "mean magnitude over the same"),
    Metric(
        "advantage/logp_covariance",
        "nats",
        "covariance of log-prob and advantage over the same (arXiv:2505.22617)",
    ),
    Metric("control/masked", "1", "share of sampled tokens that a control masked out or gave weight 0"),
    Metric(
        "control/alignment", "1", "mean cosine of a row's hidden states, mean over rows (arXiv:2506.02281)"
    ),
    Metric("control/*", "", "numbers that a control reports"),
    Metric("loss/total", "loss", "the optimizer step's loss; not comparable between methods"),
    Metric(
        "loss/*",
        "",
        "numbers that a loss or term reports, mean over the tokens (offline: the examples) that count",
    ),
    Metric(
        "process_reward/loss",
        "loss",
        "loss of the process reward model, mean over judged completions and the step's updates",
    ),
    Metric(
        "process_reward/accuracy",
        "1",
        "share of judged completions whose implicit reward has the sign of their outcome",
    ),
    Metric("process_reward/reward", "reward", "implicit reward beta u, mean over judged completions"),
    Metric(
        "process_reward/contrast",
        "1",
        "share of a prompt's right-wrong pairs that the model orders correctly, before the update",
    ),
    Metric("process_reward/abs", "nats", "|log-ratio| that the advantage receives, mean over tokens"),
    Metric("process_reward/*", "", "numbers that its loss and its optimizer report"),
    Metric("learner/epoch", "1", "passes over the examples so far"),
    Metric("learner/entropy_mean", "nats", "policy entropy, mean over sampled tokens"),
    Metric("learner/entropy_p10", "nats", "10th percentile of the same"),
    Metric("learner/entropy_p90", "nats", "90th percentile of the same"),
    Metric(
        "learner/entropy_turn_*",
        "nats",
        "policy entropy of an episode's turn of this number, from 0: mean over its sampled tokens",
    ),
    Metric("learner/tokens", "tokens", "tokens that count in the step's loss"),
    Metric("learner/grad_norm", "1", "gradient norm before clipping, mean over the step's updates"),
    Metric("learner/lr", "1", "learning rate at the start of the step"),
    Metric("learner/version", "updates", "updates so far; the number identifies the weights"),
    Metric("learner/idle_rows", "completions", "skipped in the gradient pass because they cannot contribute"),
    Metric("learner/trained_rows", "completions", "read in the gradient pass"),
    Metric("learner/trained_tokens", "tokens", "read in the gradient pass, including prompts"),
    Metric("learner/skipped_updates", "updates", "dropped because loss or gradient is not finite"),
    Metric("learner/shared_prompts", "1", "1 if each pair's prompt was read once for both completions"),
    Metric(
        "sync/checked", "weights", "weights whose fingerprints learner and engine compared after the push"
    ),
    Metric(
        "sync/probe",
        "nats",
        "mean difference of the engine's and the learner's log-probs of one fixed row, where vLLM "
        "has an adapter",
    ),
    Metric(
        "sync/difference",
        "1",
        "largest relative difference of those fingerprints; a value above 0 is rounding",
    ),
    Metric("eval/reward", "reward", "mean over graded held-out completions"),
    Metric("eval/tokens", "tokens", "mean held-out completion length"),
    Metric("eval/ungraded", "completions", "held-out, left ungraded"),
    Metric(
        "eval/pass@*",
        "1",
        "unbiased pass@k over held-out prompts; _low and _high bound the 95 % bootstrap interval",
    ),
    Metric(
        "eval/avg@*", "1", "mean score over k completions of each held-out prompt; _low and _high as above"
    ),
    Metric(
        "eval/rank_me",
        "directions",
        "effective rank of the hidden states that predict the last tokens of held-out completions",
    ),
    Metric("eval/alpha_req", "1", "exponent of the decay of their covariance's eigenvalues"),
    Metric("eval/examples", "examples", "held-out pairs or completions"),
    Metric(
        "eval/accuracy",
        "1",
        "share of held-out comparisons in which the better completion has the higher implicit reward; a tie "
        "counts one half",
    ),
    Metric("eval/accuracy_*", "1", "low and high: its 95 % bootstrap interval over prompts"),
    Metric(
        "eval/margin",
        "reward",
        "mean difference of those rewards; for single completions the log-ratio in nats",
    ),
    Metric("eval/margin_*", "reward", "low and high: its interval"),
    Metric("eval/loss", "loss", "mean over held-out examples; not comparable between methods"),
    Metric("eval/loss_*", "loss", "low and high: its interval"),
    Metric(
        "eval/brier",
        "1",
        "mean squared difference between sigmoid(margin) and the data's degree of preference (eval.gamma, "
        "p_chosen, or 1)",
    ),
    Metric("eval/brier_*", "1", "low and high: its interval"),
    Metric(
        "eval/ece",
        "1",
        "expected calibration error of sigmoid(margin) against that degree, in ten bins of confidence",
    ),
    Metric(
        "eval/entropy",
        "nats",
        "policy entropy, mean over the tokens of held-out chosen or desirable completions",
    ),
    Metric("eval/entropy_*", "nats", "low and high: its interval"),
    Metric(
        "eval/sampled_entropy",
        "nats",
        "the same over completions that the policy samples for held-out prompts at temperature 1",
    ),
    Metric("eval/sampled_entropy_*", "nats", "low and high: its interval"),
    Metric("eval/sampled_tokens", "tokens", "mean length of those, cut at data.max_completion_tokens"),
    Metric("eval/sampled_tokens_*", "tokens", "low and high: its interval"),
    Metric("eval/logp_*", "nats", "mean log-prob of held-out completions, summed over their tokens"),
    Metric("eval/*", "", "numbers that a preference loss reports, mean over held-out examples"),
    Metric("time/examples_per_second", "examples/s", "judged examples per wall-clock second of the step"),
    Metric(
        "law/a",
        "reward",
        "a of R = -a exp(H) + b fitted to this run's steps (arXiv:2505.22617); _low and _high bound 95 %",
    ),
    Metric("law/ceiling", "reward", "b - a: the reward that the law predicts at zero entropy"),
    Metric("law/gain_left", "reward", "ceiling minus the law's reward at the entropy of the last steps"),
    Metric("law/entropy_left", "1", "share of exp(H) - 1 at the start that is left"),
    Metric("law/exhausted", "1", "1 if almost no entropy is left to trade and reward falls with entropy"),
    Metric("law/eval_*", "1", "the same for held-out pass@1"),
    Metric("law/*", "reward", "b, and the bounds of a, b and ceiling"),
    Metric("time/step", "s", "wall-clock time of the step"),
    Metric("time/tokens_per_second", "tokens/s", "sampled tokens per wall-clock second of the step"),
    Metric("time/elapsed", "s", "time since the run started or resumed"),
    Metric("time/*", "s", "wall-clock time of one phase of the step"),
    Metric("memory/process", "GiB", "resident memory of rank 0's process, without those it started"),
    Metric("memory/process_peak", "GiB", "the most of it since the process started"),
    Metric("memory/gpu_allocated", "GiB", "allocated by torch on rank 0's GPU after the step"),
    Metric("memory/gpu_reserved", "GiB", "reserved by torch there, with what its allocator keeps for later"),
    Metric("memory/gpu_peak", "GiB", "the most that torch had allocated there since the process started"),
)
_OF_THE_MACHINE = ("time/", "memory/")

_EXACT = {metric.name: metric for metric in METRICS if not metric.name.endswith("*")}
_PREFIXES = {metric.name[:-1]: metric for metric in METRICS if metric.name.endswith("*")}


def metric(name: str) -> Metric:
    """The table's row for ``name``. Raises ValueError that suggests the nearest name if there is none."""
    if name in _EXACT:
        return _EXACT[name]
    for prefix, row in _PREFIXES.items():
        if name.startswith(prefix) and name != prefix:
            return row
    raise ValueError(
        f"no metric is called {name!r}{suggestion(name, _EXACT)} New metrics get a row in "
        "rltrain/report/names.py"
    )


def reproducible_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``metrics`` that the same recipe and seed repeat: all but times and memory."""
    return {name: value for name, value in metrics.items() if not name.startswith(_OF_THE_MACHINE)}


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError on the first name that the table lacks."""
    for name in names:
        metric(name)
