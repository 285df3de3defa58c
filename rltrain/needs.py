"""The words that ``@method`` may declare, as constants: needs, which a stage computes on request, and traits,
which rules and stages read. ``docs/needs.md`` is made from this file by ``scripts/needs_table.py``.

B completions, T completion tokens, N examples of a preference loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Set
from typing import Final, Self, TypeVar

__all__ = ["NEEDS", "NOW", "TRAITS", "Need", "Trait", "Word", "find_word_problems"]

NOW: Final = "_now"  # the ending of a need that is taken at the start of the optimizer batch


class Word(str):
    """A word of declarations. It equals its text: ``{"old_logp"}`` and ``{OLD_LOGP}`` declare the same.

    meaning: a line of the documents. argument: what follows a colon, as in ``policy_loss:clip``, which is
    ``POLICY_LOSS("clip")``; empty: nothing may. A hyperparameter in braces is replaced by its value:
    ``CLAMPED_ENTROPY("{share}")``.
    """

    meaning: str
    argument: str
    is_optional: bool  # whether the argument may be left out

    def __new__(cls, text: str, meaning: str, argument: str = "", is_optional: bool = False) -> Self:
        word = super().__new__(cls, text)
        word.meaning = meaning
        word.argument = argument
        word.is_optional = is_optional
        return word

    def __call__(self, argument: str) -> str:
        """The word with its argument."""
        return f"{self}:{argument}"


class Need(Word):
    @property
    def update_start(self) -> str:
        """The same of the policy at the start of the optimizer batch, for controls."""
        return f"{self}{NOW}"


class Trait(Word):
    pass


WordKind = TypeVar("WordKind", Need, Trait)

MASK: Final = Need("mask", "(B, T) bool, tokens that the policy wrote and that count in the loss")
SOURCE: Final = Need("source", "(B,) int64, where the completion comes from: `types/samples.py`, SOURCE_*")
OLD_LOGP: Final = Need(
    "old_logp", "(B, T) nats, log-probs of the learner before the first update of the step"
)
OLD_ENTROPY: Final = Need(
    "old_entropy", "(B, T) nats, entropies of the learner before the first update of the step"
)
LOGP_NOW: Final = Need(
    "logp_now", "(B, T) nats, log-probs of the learner at the start of the optimizer batch"
)
ENTROPY_NOW: Final = Need(
    "entropy_now", "(B, T) nats, entropies of the learner at the start of the optimizer batch"
)
ROLLOUT_LOGP: Final = Need("rollout_logp", "(B, T) nats, log-probs that the engine reported")
REF_LOGP: Final = Need(
    "ref_logp", "nats, log-probs of the frozen reference, (B, T); (N,) sums in preference losses"
)
TEACHER_LOGP: Final = Need("teacher_logp", "(B, T) nats, log-probs of the frozen teacher")
REF_LOG_MASS: Final = Need(
    "ref_log_mass",
    "(B, T) nats, log of the sum of the reference's probabilities to this power (arXiv:2510.03865)",
    argument="power",
)
PROCESS_REWARD: Final = Need(
    "process_reward", "(B, T) nats, log-ratio of a process reward model and its reference"
)
STEP_ID: Final = Need("step_id", "(B, T) int64, the turn or reasoning step of the token; -1 outside the mask")
ANSWER: Final = Need(
    "answer", "(B,) int64, equal for equal extracted answers of one prompt; -1 without an answer"
)
PARTS: Final = Need("parts", "(B,) the values of each reward function by its name, before weights and sums")
VERSION: Final = Need("version", "(B, T) int64, updates of the policy that sampled the token")
ALIGNMENT: Final = Need(
    "alignment", "per prompt, the alignment of its hidden states, by which `gain_rl` orders prompts"
)
ENTROPY: Final = Need(
    "entropy",
    "(B, T) nats, the entropy; with a temperature that at this temperature, with gradient",
    argument="temperature",
    is_optional=True,
)
ENTROPY_GRAD: Final = Need("entropy_grad", "(B, T) nats, the entropy with gradient, as `policy.entropy`")
CLAMPED_ENTROPY: Final = Need(
    "clamped_entropy", "(B, T) nats, the entropy without this share of least likely tokens", argument="share"
)
SHARPENED_ENTROPY: Final = Need(
    "sharpened_entropy", "(B, T) nats, the entropy of the probabilities to this power", argument="power"
)
EXPECTED_ENTROPY_SLOPE: Final = Need(
    "expected_entropy_slope", "(B, T), `sum_v p_v^2 (ln p_v + H)` (arXiv:2510.10150)"
)
TEMPERED_LOGP: Final = Need(
    "tempered_logp", "(B, T) nats, the log-prob at this temperature", argument="temperature"
)
COLLISION: Final = Need("collision", "(B, T), the probability that two draws are the same token")
LOG_MASS: Final = Need(
    "log_mass", "(B, T) nats, the log of the sum of the probabilities to this power", argument="power"
)
REFERENCE_WEIGHTS: Final = Need(
    "reference_weights", "the reference's weights in the engine while a source of samples asks for them"
)
LABEL: Final = Need("label", "(N,) 1 desirable, 0 undesirable")
MARGIN: Final = Need("margin", "(N,) score of the chosen completion minus that of the rejected one")
P_CHOSEN: Final = Need("p_chosen", "(N,) probability that the chosen completion is better")
PREVIOUS_LOGP: Final = Need("previous_logp", "(N,) nats, log-probs of the frozen previous iterate")
COLUMN: Final = Need("column", "(N,) this column of the data", argument="name of a column")
MISMATCHED: Final = Need(
    "mismatched", "log-probs of prompts with other prompts' completions, for KTO's reference point"
)
Z0: Final = Need("z0", "() nats, KTO's reference point (arXiv:2402.01306)")
DESIRABLE_SHARE: Final = Need("desirable_share", "() share of desirable completions in the optimizer batch")
MEAN_MARGIN: Final = Need("mean_margin", "() nats, mean margin of the optimizer batch (arXiv:2503.17928)")
MEAN_CHOSEN_LENGTH: Final = Need(
    "mean_chosen_length", "() scored tokens per chosen completion of the optimizer batch"
)
MEAN_LENGTH: Final = Need("mean_length", "() scored tokens per completion of the optimizer batch")
TARGET_TOKENS_PER_EXAMPLE: Final = Need(
    "target_tokens_per_example", "() scored target-language tokens per row (arXiv:2505.14297)"
)
LOG_RATIO_CENTRE: Final = Need(
    "log_ratio_centre",
    "() nats, between the classes' mean log-ratios in the optimizer batch (arXiv:2404.04656)",
)
REFERENCE_MARGIN_AT_RANK: Final = Need(
    "reference_margin_at_rank",
    "(N,) nats, the reference's margin whose rank in the optimizer batch is that of the policy's margin "
    "(arXiv:2406.05882)",
)
REJECTED_AT_RANK: Final = Need(
    "rejected_at_rank",
    "(N, 2) nats, the rejected log-ratio of the rank that the row's chosen one has, and the chosen one of "
    "the rank that its rejected one has (arXiv:2406.05882)",
)
GROUP_SIZE: Final = Need("group_size", "(N,) completions of the row's prompt in the optimizer batch")
REWARD_SOFTMAX: Final = Need(
    "reward_softmax", "(N,) softmax of the labels over the completions of a prompt (arXiv:2402.05369)"
)

GROUPLESS: Final = Trait("groupless", "an advantage that needs no second completion of a prompt")
NO_SIGNAL: Final = Trait("no_signal", "an advantage or a reward that is zero everywhere")
REWARD_FREE: Final = Trait(
    "reward_free", "reads no reward; a policy loss with it has a gradient where the advantage is 0"
)
ACTS_EVERYWHERE: Final = Trait("acts_everywhere", "a policy loss with a gradient where the advantage is 0")
OWNS_CLIPPING: Final = Trait("owns_clipping", "a policy loss that defines the clipping rule")
SEQUENCE_LEVEL: Final = Trait("sequence_level", "a policy loss with one ratio per sequence")
ACTS_ON_MARKS: Final = Trait(
    "acts_on_marks", "a policy loss with a gradient where `batch.extra` is not 0, whatever the advantage"
)
OFF_POLICY_ONLY: Final = Trait("off_policy_only", "changes nothing with one update per rollout")
TOKEN_LEVEL: Final = Trait("token_level", "a control that gives the tokens of a sequence different weights")
PER_UPDATE: Final = Trait(
    "per_update", "a control that runs on each optimizer batch rather than once per step"
)
NEEDS_CORRECT: Final = Trait("needs_correct", "needs a reward that reports correctness")
FRACTION: Final = Trait("fraction", "this hyperparameter is above 0 and at most 1", argument="hyperparameter")
SAME_AS_POLICY_LOSS: Final = Trait(
    "same_as_policy_loss", "this hyperparameter must equal that of the policy loss", argument="hyperparameter"
)
POLICY_LOSS: Final = Trait("policy_loss", "made for this policy loss", argument="policy loss")
CONTROL: Final = Trait("control", "needs this control", argument="control")
AGGREGATE: Final = Trait("aggregate", "exact under this aggregate", argument="aggregate")
LOSS_TERM: Final = Trait("loss_term", "marks tokens for this term", argument="term")
EXTRA_SAMPLES: Final = Trait("extra_samples", "works on rows of this source", argument="source of samples")
TRAINS: Final = Trait("trains", "a source whose rows are trained on")
FOR_ADVANTAGE: Final = Trait(
    "for_advantage", "a source whose rows only an advantage that reads `source` can use"
)
GIVES_HISTORY: Final = Trait("gives_history", "a coefficient that gives its term the input `history`")
GIVES_SMOOTHING: Final = Trait("gives_smoothing", "a coefficient that gives its term the input `smoothing`")
PAIRS: Final = Trait("pairs", "a preference loss on pairs")
LABELS: Final = Trait("labels", "a preference loss on single completions with labels")
SCALAR_HEAD: Final = Trait("scalar_head", "a preference loss that trains a scalar head")
REFERENCE_FREE: Final = Trait("reference_free", "a preference loss without a reference model")
PREVIOUS_POLICY: Final = Trait(
    "previous_policy", "a preference loss that compares with the policy which sampled the pairs"
)
MARGINS: Final = Trait("margins", "a preference loss whose data must have score differences or probabilities")
GAMMA_REQUIRED: Final = Trait(
    "gamma_required", "a preference loss whose hyperparameter gamma has no usable default"
)
WHOLE_GROUPS: Final = Trait(
    "whole_groups", "a preference loss that needs all completions of a prompt in one optimizer batch"
)
OWN_REWARDS: Final = Trait("own_rewards", "an environment that gives rewards of its own")
ON_POLICY_ONLY: Final = Trait(
    "on_policy_only", "a policy loss without a ratio, exact in the first update of a rollout only"
)
EQUAL_SEQUENCES: Final = Trait("equal_sequences", "an aggregate in which every sequence has the same weight")
PENALTY_OF_REWARD: Final = Trait(
    "penalty_of_reward",
    "a term that an advantage with this hyperparameter has in the reward already",
    argument="hyperparameter",
)
SINGLE_TURN: Final = Trait("single_turn", "a source whose rows cannot be episodes of an environment")
COMPARES_REWARDS: Final = Trait("compares_rewards", "a judge that reads the scores of the reward functions")
READS_ENVIRONMENT: Final = Trait("reads_environment", "a reward that is the verdict of an environment")
REPORTS_CORRECT: Final = Trait("reports_correct", "a reward that reports correctness")
REPORTS_ANSWER: Final = Trait("reports_answer", "a reward that extracts the answers which it judges")


def _constants_of(kind: type[WordKind]) -> Mapping[str, WordKind]:
    return {str(word): word for word in list(globals().values()) if isinstance(word, kind)}


NEEDS: Final = _constants_of(Need)
TRAITS: Final = _constants_of(Trait)


def find_word_problems(needs: Set[str], traits: Set[str]) -> Iterator[str]:
    """What is wrong with the words of a declaration: nothing computes or reads one, its argument is missing
    or one too many.
    """
    for need in sorted(needs):
        text = need.partition(":")[0]
        word = NEEDS.get(text) or NEEDS.get(text.removesuffix(NOW))
        yield from _word_problems("need", need, word, NEEDS)
    for trait in sorted(traits):
        yield from _word_problems("trait", trait, TRAITS.get(trait.partition(":")[0]), TRAITS)


def _word_problems(kind: str, declared: str, word: Word | None, table: Mapping[str, Word]) -> Iterator[str]:
    text, _, argument = declared.partition(":")
    if word is None:
        matches = difflib.get_close_matches(text, table, n=1, cutoff=0.5)
        nearest = f"did you mean {matches[0]!r}?" if matches else "docs/needs.md lists them"
        yield f"no {kind} is called {text!r}; {nearest}"
    elif argument and not word.argument:
        yield f"the {kind} {text!r} takes no argument and has {argument!r}; write {text!r}"
    elif word.argument and not argument and not word.is_optional:
        yield f"the {kind} {text!r} lacks its argument ({word.argument}); write '{text}:...'"
