"""CLO: a preference loss with a second, supervised term, known only from notes."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import log_ratios, pair_metrics
from rltrain.loss.preference.statistics import statistic
from rltrain.needs import COLUMN, PAIRS, REF_LOGP, TARGET_TOKENS_PER_EXAMPLE
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["clo"]


@method(
    "clo",
    arxiv="2505.14297",
    needs={REF_LOGP, COLUMN("is_target_language"), TARGET_TOKENS_PER_EXAMPLE},
    traits={PAIRS},
)
def clo(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, sft_share: float = 0.5) -> ExampleLoss:
    """CLO: DPO plus a likelihood over target-language rows only, arXiv:2505.14297. Values (N,).

    Formula: ``sft_share NLL - (1 - sft_share) ln sigmoid(z)``

    A pair holds the same answer in two languages; the one in the prompt's language is chosen (column
    is_target_language: 1 or 0). The NLL is one mean over the chosen tokens of the optimizer batch's target
    rows, 0 without such rows; DPO's mean is over all rows; beta as in ``dpo``. Confidence: medium. sft_share,
    beta and both reductions are our choice, since only third-party notes were available.
    """
    tokens = statistic(batch, "target_tokens_per_example", "clo").to(policy.chosen.logp.dtype)
    target = batch.columns["is_target_language"].to(tokens.dtype)
    nll = -policy.chosen.logp * target / tokens.clamp(min=1e-9)
    chosen, rejected = log_ratios(policy, batch)
    values = sft_share * nll + (1 - sft_share) * -logsigmoid(beta * (chosen - rejected))
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected) | {"sft": nll.detach()})
