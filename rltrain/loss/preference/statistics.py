"""Statistics over a whole optimizer batch (all ranks, all micro-batches) that a preference loss may need.

Each is a pure function of the gathered batch. Its keyword-only arguments are hyperparameters of the loss that
needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.loss.preference import STATISTICS, statistics_of
from rltrain.needs import COLUMN, LABEL, LOGP_NOW, MISMATCHED, REF_LOGP
from rltrain.registry import BoundMethod, method
from rltrain.tensor_ops import segment_count, segment_mean
from rltrain.types.preference import CompletionFacts, LabelBatch, PairBatch

__all__ = ["labels", "statistic", "with_batch_statistics"]


@torch.no_grad()
def with_batch_statistics(batch: PairBatch | LabelBatch, loss: BoundMethod) -> PairBatch | LabelBatch:
    """``batch`` with the statistics that ``loss`` needs.

    It must be the whole optimizer batch over all ranks; split it into micro-batches only afterwards.
    """
    hp = {name: parameter.default for name, parameter in loss.spec.hyperparameters.items()} | dict(loss.hp)
    for name in statistics_of(loss):
        statistic = STATISTICS.bind(name)
        inputs = {key: hp[key] for key in statistic.spec.inputs}
        batch = batch.with_statistics(**{name: statistic(batch, **inputs)})
    return batch


def statistic(batch: PairBatch | LabelBatch, name: str, loss: str) -> Tensor:
    """() or (N,) a statistic of the batch. Raises ValueError if ``with_batch_statistics`` did not add it."""
    if name not in batch.statistics:
        raise ValueError(
            f"{loss} needs the statistic {name!r} of the optimizer batch; call "
            "statistics.with_batch_statistics on the whole batch first"
        )
    return batch.statistics[name]


def labels(batch: LabelBatch, caller: str) -> Tensor:
    """(N,) the batch's labels. Raises ValueError if it has none."""
    if batch.label is None:
        raise ValueError(
            f"{caller}: the batch has no labels; the data needs a column label (true where the completion is "
            "good)"
        )
    return batch.label


@method("z0", needs={MISMATCHED})
def z0(batch: LabelBatch) -> Tensor:
    """() nats: KTO's reference point, max(0, mean log-ratio of prompts with other prompts' completions),
    arXiv:2402.01306.

    The mean over the whole batch is clamped; clamping the mean of each rank or micro-batch would bias it
    upwards.
    """
    if batch.mismatched is None:
        raise ValueError(
            "kto needs log-probs of mismatched completions (prompt i with another prompt's completion) for "
            "its z0"
        )
    return _log_ratio_now(batch.mismatched).mean().clamp(min=0)


@method("desirable_share", needs={LABEL})
def desirable_share(batch: LabelBatch) -> Tensor:
    """() share of the batch's completions that are desirable; for metrics per class."""
    return (labels(batch, "a statistic over labels") > 0.5).double().mean()


@method("mean_margin", needs={LOGP_NOW, REF_LOGP})
def mean_margin(batch: PairBatch, *, margin_type: str) -> Tensor:
    """() nats: NaPO's mean margin of the current policy relative to its reference, arXiv:2503.17928.

    Per token with "avglogp".
    """
    chosen = _log_ratio_now(batch.chosen)
    rejected = _log_ratio_now(batch.rejected)
    if margin_type == "avglogp":
        chosen = chosen / batch.chosen.length
        rejected = rejected / batch.rejected.length
    return (chosen - rejected).mean()


@method("mean_chosen_length")
def mean_chosen_length(batch: PairBatch) -> Tensor:
    """() scored tokens per chosen completion, which converts a mean over examples into one over tokens."""
    return batch.chosen.length.double().mean()


@method("mean_length")
def mean_length(batch: LabelBatch) -> Tensor:
    """() scored tokens per completion, which converts a mean over completions into one over tokens."""
    return batch.completion.length.double().mean()


@method("target_tokens_per_example", needs={COLUMN("is_target_language")})
def target_tokens_per_example(batch: PairBatch) -> Tensor:
    """() scored chosen tokens of target-language rows, divided by all rows (CLO, arXiv:2505.14297)."""
    return (batch.chosen.length * batch.columns["is_target_language"]).double().mean()


@method("reward_softmax", needs={LABEL})
def reward_softmax(batch: LabelBatch, *, temperature: float) -> Tensor:
    """(N,) softmax of label / temperature over the completions of each prompt (NCA, arXiv:2402.05369).

    The batch must hold whole groups.
    """
    scaled = labels(batch, "a statistic over labels").double() / temperature
    index = torch.unique(batch.prompt, return_inverse=True)[1]
    top = torch.full_like(scaled, -torch.inf).scatter_reduce(0, index, scaled, "amax")[index]
    powers = (scaled - top).exp()
    return powers / (segment_mean(powers, batch.prompt) * segment_count(batch.prompt))


@method("group_size")
def group_size(batch: LabelBatch) -> Tensor:
    """(N,) number of completions of each row's prompt in the optimizer batch."""
    return segment_count(batch.prompt)


@method("log_ratio_centre", needs={LABEL, LOGP_NOW, REF_LOGP})
def log_ratio_centre(batch: LabelBatch) -> Tensor:
    """() nats: half the sum of the mean log-ratios of desirable and undesirable completions, or the only mean
    of a batch with one class (BCO, arXiv:2404.04656).
    """
    ratios = _log_ratio_now(batch.completion)
    desirable = labels(batch, "a statistic over labels") > 0.5
    means = [ratios[side].mean() for side in (desirable, ~desirable) if bool(side.any())]
    return torch.stack(means).mean()


@method("reference_margin_at_rank", needs={LOGP_NOW, REF_LOGP})
def reference_margin_at_rank(batch: PairBatch) -> Tensor:
    """(N,) nats: the reference's margin whose rank is that of the policy's margin (AOT, arXiv:2406.05882)."""
    ratio = _log_ratio_now(batch.chosen) - _log_ratio_now(batch.rejected)
    assert batch.chosen.ref_logp is not None and batch.rejected.ref_logp is not None
    reference = batch.chosen.ref_logp - batch.rejected.ref_logp
    return reference.sort().values[_ranks(ratio + reference)]


@method("rejected_at_rank", needs={LOGP_NOW, REF_LOGP})
def rejected_at_rank(batch: PairBatch) -> Tensor:
    """(N, 2) nats: the rejected log-ratio of the rank that the row's chosen one has, and the chosen log-ratio
    of the rank that its rejected one has (AOT, arXiv:2406.05882).
    """
    chosen = _log_ratio_now(batch.chosen)
    rejected = _log_ratio_now(batch.rejected)
    return torch.stack(
        [rejected.sort().values[_ranks(chosen)], chosen.sort().values[_ranks(rejected)]], dim=1
    )


def _ranks(values: Tensor) -> Tensor:
    """(N,) int64 the place of each number among the sorted ones."""
    return values.argsort(stable=True).argsort(stable=True)


def _log_ratio_now(facts: CompletionFacts) -> Tensor:
    if facts.logp_now is None or facts.ref_logp is None:
        missing = "logp_now" if facts.logp_now is None else "ref_logp"
        raise ValueError(
            f"a statistic of the current policy needs {missing} over the whole optimizer batch, which was "
            "not computed"
        )
    return facts.logp_now - facts.ref_logp
