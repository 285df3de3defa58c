"""Held-out accuracy, margin and calibration of the implicit reward, and the policy's entropy, with
intervals over prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rltrain.errors import UserError
from rltrain.learner.passes import last_states
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.loss.preference.margins import target_probability
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.ratio import count_wins
from rltrain.loss.preference.statistics import with_batch_statistics
from rltrain.report.spectrum import spectrum_metrics
from rltrain.report.statistics import Estimate, calibration_error, clustered_average
from rltrain.seeds import stable_hash
from rltrain.train.examples import Examples
from rltrain.train.own_samples import OwnSamples
from rltrain.types.preference import LabelBatch, PairBatch
from rltrain.types.samples import ScoredGroup

# reported with their intervals; all other numbers of a loss are reported as means
_WITH_INTERVAL = ("accuracy", "margin", "loss", "brier", "entropy", "sampled_entropy", "sampled_tokens")


@dataclass(frozen=True)
class PreferenceEvaluation:
    """One evaluation: estimates by name, in the loss's own rewards."""

    estimates: Mapping[str, Estimate]
    examples: int
    calibration_error: float | None = None  # of pairs
    groups: tuple[ScoredGroup, ...] = ()  # no completion is graded
    spectrum: Mapping[str, float] = field(default_factory=dict)  # metrics of the policy's hidden states

    def metrics(self) -> dict[str, float]:
        metrics = {"eval/examples": float(self.examples), **self.spectrum}
        if self.calibration_error is not None:
            metrics["eval/ece"] = self.calibration_error
        for name, estimate in self.estimates.items():
            metrics[f"eval/{name}"] = estimate.value
            if name in _WITH_INTERVAL:
                metrics |= {f"eval/{name}_low": estimate.low, f"eval/{name}_high": estimate.high}
        return metrics


@dataclass(frozen=True)
class PreferenceEvaluator:
    """Scores the same held-out examples each time.

    paired: labelled completions 2i and 2i + 1 are the sides of a pair. gamma: the chosen side of a pair with
    the data margin m is preferred with probability sigmoid(gamma m), and a missing margin raises UserError;
    None: with the data's p_chosen, or 1 where the data have none.
    """

    learner: PreferenceLearner
    examples: Examples
    objective: PreferenceObjective
    paired: bool = False
    gamma: float | None = None
    samples: OwnSamples | None = None
    spectrum: bool = False  # of the hidden states on the chosen or desirable completions

    def __post_init__(self) -> None:
        if self.gamma is not None and (
            not isinstance(self.examples.full_batch, PairBatch) or self.examples.full_batch.margin is None
        ):
            raise UserError(
                f"eval.gamma is {self.gamma:g}, but the held-out examples have no margins (columns margin, "
                "or score_chosen and score_rejected); leave it out"
            )

    def evaluate(self) -> PreferenceEvaluation:
        """Scores the current weights; every rank scores its share and all return the same result."""
        logp, entropy = self.learner.log_probs_and_entropy(self.examples.rows, sides=self.examples.sides)
        batch = with_batch_statistics(self._add_current_logp(logp), self.objective.loss)
        with torch.no_grad():
            result = self.objective.loss(self.learner.loss_inputs(logp, self.examples.sides), batch)

        prompts = batch.prompt.tolist()
        seed = stable_hash("bootstrap", len(batch))
        per_example = {"loss": result.values, **result.metrics}
        estimates = {
            name: clustered_average(value.tolist(), prompts, seed=seed) for name, value in per_example.items()
        }

        calibration = None
        if isinstance(batch, PairBatch):
            margin = result.metrics["margin"]
            estimates["accuracy"] = clustered_average(count_wins(margin).tolist(), prompts, seed=seed)
            probability = torch.sigmoid(margin.double())
            target = self._target_probability(batch)
            errors = (probability - target).square()
            estimates["brier"] = clustered_average(errors.tolist(), prompts, seed=seed)
            calibration = calibration_error(probability.tolist(), target.tolist())
        elif (compared := self._compare_completions(logp, batch)) is not None:
            margin, wins, compared_prompts = compared
            estimates["margin"] = clustered_average(margin.tolist(), compared_prompts, seed=seed)
            estimates["accuracy"] = clustered_average(wins.tolist(), compared_prompts, seed=seed)

        if entropy is not None:
            estimates["entropy"] = _mean_entropy(entropy, batch, seed)
        if self.samples is not None:
            estimates |= self.samples.measure(self.learner)
        spectrum: dict[str, float] = {}
        if self.spectrum:
            rows = self.examples.rows.rows(_better_rows(batch))
            spectrum = spectrum_metrics(last_states(self.learner.trained, rows))
        return PreferenceEvaluation(estimates, len(batch), calibration, spectrum=spectrum)

    def _target_probability(self, batch: PairBatch) -> Tensor:
        """(N,) the probability, according to the data, that the chosen side is better; float64."""
        if self.gamma is not None:
            assert batch.margin is not None
            return target_probability(batch.margin.double(), self.gamma)
        if batch.p_chosen is None:
            return torch.ones(len(batch), dtype=torch.float64)
        return batch.p_chosen.double()

    def _add_current_logp(self, logp: Tensor) -> PairBatch | LabelBatch:
        """The batch with the current policy's log-probs, which the statistics of a loss may need."""
        batch = self.examples.full_batch
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

    def _compare_completions(
        self, logp: Tensor, batch: LabelBatch
    ) -> tuple[Tensor, Tensor, Sequence[int]] | None:
        """(margins of the log-ratio in nats, 1 where the better completion has the higher ratio, prompt ids);
        None where there is nothing to compare.

        The sides of a pair are compared with each other. Without pairs, each desirable completion is compared
        with all undesirable ones, of any prompt.
        """
        ratio = logp if batch.completion.ref_logp is None else logp - batch.completion.ref_logp
        if self.paired:
            margin = ratio[::2] - ratio[1::2]
            return margin, count_wins(margin), batch.prompt[::2].tolist()
        if batch.label is None:
            return None
        better = batch.label > 0.5
        if not better.any() or better.all():
            return None
        differences = ratio[better][:, None] - ratio[~better][None]
        return differences.mean(1), count_wins(differences).mean(1), batch.prompt[better].tolist()


def _mean_entropy(entropy: Tensor, batch: PairBatch | LabelBatch, seed: int) -> Estimate:
    """Nats per token, mean over the tokens of the chosen or desirable completions. entropy: (N,) per row."""
    rows = _better_rows(batch)
    completions = batch.chosen if isinstance(batch, PairBatch) else batch.completion
    prompts = batch.prompt[rows].tolist()
    counts = completions.length[rows].tolist()
    return clustered_average(entropy[rows].tolist(), prompts, counts=counts, seed=seed)


def _better_rows(batch: PairBatch | LabelBatch) -> Tensor:
    """(n,) rows of the chosen or desirable completions; all rows where none is labelled desirable."""
    if isinstance(batch, LabelBatch) and batch.label is not None and (good := batch.label > 0.5).any():
        return good.nonzero().flatten()
    return torch.arange(len(batch))
