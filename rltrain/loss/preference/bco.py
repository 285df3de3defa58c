"""BCO: a binary classifier whose logit is the implicit reward."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import completion_log_ratio
from rltrain.loss.preference.statistics import labels, statistic
from rltrain.needs import LABEL, LABELS, LOG_RATIO_CENTRE, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, LabelBatch, PolicySequences

__all__ = ["bco"]


@method("bco", arxiv="2404.04656", needs={REF_LOGP, LABEL, LOG_RATIO_CENTRE}, traits={LABELS})
def bco(policy: PolicySequences, batch: LabelBatch, *, beta: float = 0.1) -> ExampleLoss:
    """BCO: a binary classifier whose logit is the implicit reward, shifted between the classes' means,
    arXiv:2404.04656. Values (N,).

    Formula: ``-ln sigmoid(+-(beta u - delta))``, + for desirable completions; ``delta = beta (mean u of
    desirable + mean u of undesirable) / 2``

    u is the log-ratio to the reference, summed over tokens. beta as in ``dpo``. The means are those of the
    optimizer batch, without gradient; the release and TRL average it over past batches. A batch with a single
    class takes that class's mean. The density ratio of prompts that differ between the classes is not
    estimated.
    """
    desirable = labels(batch, "bco") > 0.5
    reward = beta * completion_log_ratio(policy, batch.completion)
    gain = reward - beta * statistic(batch, "log_ratio_centre", "bco").to(reward.dtype)
    values = -logsigmoid(torch.where(desirable, gain, -gain))
    with torch.no_grad():
        accuracy = torch.where(desirable, gain > 0, gain < 0).to(reward.dtype)
    return ExampleLoss(values, {"reward": reward.detach(), "accuracy": accuracy})
