"""Held-out accuracy, margin and calibration of the implicit reward, and the policy's entropy, with
intervals over prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.errors import UserError
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.loss.preference.margins import target_probability
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.statistics import with_batch_statistics
from rltrain.report.statistics import Estimate, calibration_error, clustered_average
from rltrain.seeds import stable_hash
from rltrain.train.examples import Examples
from rltrain.train.own_samples import OwnSamples
from rltrain.types.preference import LabelBatch, PairBatch

# With their intervals; everything else a loss reports is a mean.
_SHOWN = ("accuracy", "margin", "loss", "brier", "entropy", "sampled_entropy", "sampled_tokens")


@dataclass(frozen=True)
class PreferenceEvaluation:
    """One evaluation: estimates by name, in the loss's own rewards."""

    estimates: Mapping[str, Estimate]
    examples: int
    calibration_error: float | None = None  # of pairs

    def metrics(self) -> dict[str, float]:
        found = {"eval/examples": float(self.examples)}
        if self.calibration_error is not None:
            found["eval/ece"] = self.calibration_error
        for name, one in self.estimates.items():
            found[f"eval/{name}"] = one.value
            if name in _SHOWN:
                found |= {f"eval/{name}_low": one.low, f"eval/{name}_high": one.high}
        return found


@dataclass(frozen=True)
class PreferenceEvaluator:
    """Scores the same held-out examples each time.

    paired: labelled completions 2i and 2i + 1 are the sides of a pair. gamma: a data margin m is a preference
    held to the degree sigmoid(gamma m); None: the data's p_chosen, or certainty where there is none. Raises
    UserError where a margin is then missing.
    """

    learner: PreferenceLearner
    examples: Examples
    objective: PreferenceObjective
    paired: bool = False
    gamma: float | None = None
    samples: OwnSamples | None = None

    def __post_init__(self) -> None:
        if self.gamma is not None and (
            not isinstance(self.examples.whole, PairBatch) or self.examples.whole.margin is None
        ):
            raise UserError(
                f"eval.gamma is {self.gamma:g}, but the held-out examples have no margins (columns margin, "
                "or score_chosen and "
                "score_rejected); leave it out"
            )

    def evaluate(self) -> PreferenceEvaluation:
        """With the weights as they are; every rank scores its share and all return the same result."""
        logp, entropy = self.learner.log_probs_and_entropy(self.examples.rows, sides=self.examples.sides)
        batch = with_batch_statistics(self._with_now(logp), self.objective.loss)
        with torch.no_grad():
            result = self.objective.loss(self.learner.loss_inputs(logp, self.examples.sides), batch)
        prompts, seed = batch.prompt.tolist(), stable_hash("bootstrap", len(batch))
        per_example = {"loss": result.values, **result.metrics}
        found = {
            name: clustered_average(value.tolist(), prompts, seed=seed) for name, value in per_example.items()
        }
        calibration = None
        if isinstance(batch, PairBatch):
            margin = result.metrics["margin"]
            found["accuracy"] = clustered_average(_won(margin).tolist(), prompts, seed=seed)
            probability, degree = torch.sigmoid(margin.double()), self._degree(batch)
            found["brier"] = clustered_average((probability - degree).square().tolist(), prompts, seed=seed)
            calibration = calibration_error(probability.tolist(), degree.tolist())
        elif (compared := self._compared(logp, batch)) is not None:
            margin, won, of = compared
            found["margin"] = clustered_average(margin.tolist(), of, seed=seed)
            found["accuracy"] = clustered_average(won.tolist(), of, seed=seed)
        if entropy is not None:
            at, tokens = (
                _better(batch),
                (batch.chosen if isinstance(batch, PairBatch) else batch.completion).length,
            )
            of = batch.prompt[at].tolist()
            found["entropy"] = clustered_average(
                entropy[at].tolist(), of, counts=tokens[at].tolist(), seed=seed
            )
        if self.samples is not None:
            found |= self.samples.measure(self.learner)
        return PreferenceEvaluation(found, len(batch), calibration)

    def _degree(self, batch: PairBatch) -> Tensor:
        """(N,) to which degree the data hold that chosen is the better one, float64."""
        if self.gamma is not None:
            assert batch.margin is not None
            return target_probability(batch.margin.double(), self.gamma)
        return (
            torch.ones(len(batch), dtype=torch.float64) if batch.p_chosen is None else batch.p_chosen.double()
        )

    def _with_now(self, logp: Tensor) -> PairBatch | LabelBatch:
        """The batch with the current policy's log-probs in it, which a loss's statistics may need."""
        batch = self.examples.whole
        if isinstance(batch, PairBatch):
            sides = zip((batch.chosen, batch.rejected), logp.chunk(2), strict=True)
            chosen, rejected = (dataclasses.replace(facts, logp_now=now) for facts, now in sides)
            return dataclasses.replace(batch, chosen=chosen, rejected=rejected)
        batch = dataclasses.replace(batch, completion=dataclasses.replace(batch.completion, logp_now=logp))
        if self.examples.mismatches is None:
            return batch
        _, with_others, others = self.examples.batch(range(len(batch)), step=1)
        assert (
            others is not None and isinstance(with_others, LabelBatch) and with_others.mismatched is not None
        )
        now = dataclasses.replace(with_others.mismatched, logp_now=self.learner.log_probs(others, sides=1))
        return dataclasses.replace(batch, mismatched=now)

    def _compared(self, logp: Tensor, batch: LabelBatch) -> tuple[Tensor, Tensor, Sequence[int]] | None:
        """(margins in nats of the log-ratio, 1 where the better one is above, prompt ids), where there is
        something to compare.

        Sides of pairs are compared with each other; else each desirable completion with all that are not, of
        whatever prompt.
        """
        ratio = logp if batch.completion.ref_logp is None else logp - batch.completion.ref_logp
        if self.paired:
            margin = ratio[::2] - ratio[1::2]
            return margin, _won(margin), batch.prompt[::2].tolist()
        if batch.label is None:
            return None
        better = batch.label > 0.5
        if not better.any() or better.all():
            return None
        differences = ratio[better][:, None] - ratio[~better][None]
        return differences.mean(1), _won(differences).mean(1), batch.prompt[better].tolist()


def _better(batch: PairBatch | LabelBatch) -> Tensor:
    """(n,) rows of the chosen or desirable completions; of all where nobody calls one so."""
    if isinstance(batch, LabelBatch) and batch.label is not None and (good := batch.label > 0.5).any():
        return good.nonzero().flatten()
    return torch.arange(len(batch))


def _won(margin: Tensor) -> Tensor:
    """1 above 0, one half at 0: a policy that is its reference prefers neither side."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()
