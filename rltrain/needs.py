"""What ``@method`` may declare: needs, which a stage computes on request, and traits, which rules and stages
read. ``docs/needs.md`` is made from this file by ``scripts/needs_table.py``.

B completions, T completion tokens, N examples of a preference loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Final

__all__ = ["NEEDS", "TRAITS", "unknown_words"]

# An argument follows the word: "entropy:0.5", "column:NAME". With the ending "_now" a control gets a
# statistic of the policy at the start of the optimizer batch.
NEEDS: Final[Mapping[str, str]] = {
    "mask": "(B, T) bool, tokens that the policy wrote and that count in the loss",
    "source": "(B,) int64, where the completion comes from: `types/samples.py`, SOURCE_*",
    "old_logp": "(B, T) nats, log-probs of the learner before the first update of the step",
    "old_entropy": "(B, T) nats, entropies of the learner before the first update of the step",
    "logp_now": "(B, T) nats, log-probs of the learner at the start of the optimizer batch",
    "entropy_now": "(B, T) nats, entropies of the learner at the start of the optimizer batch",
    "rollout_logp": "(B, T) nats, log-probs that the engine reported",
    "ref_logp": "nats, log-probs of the frozen reference, (B, T); (N,) sums in preference losses",
    "teacher_logp": "(B, T) nats, log-probs of the frozen teacher",
    "ref_log_mass": "(B, T) nats, log of the sum of the reference's powers (arXiv:2510.03865)",
    "process_reward": "(B, T) nats, log-ratio of a process reward model and its reference",
    "step_id": "(B, T) int64, the turn or reasoning step of the token; -1 outside the mask",
    "answer": "(B,) int64, equal for equal extracted answers of one prompt; -1 without an answer",
    "alignment": "per prompt, the alignment of its hidden states, by which `gain_rl` orders prompts",
    "entropy": "(B, T) nats, the entropy; with an argument that at another temperature, with gradient",
    "entropy_grad": "(B, T) nats, the entropy with gradient, as `policy.entropy`",
    "clamped_entropy": "(B, T) nats, the entropy without the share of least likely tokens in the argument",
    "sharpened_entropy": "(B, T) nats, the entropy of the probabilities to the power that is the argument",
    "expected_entropy_slope": "(B, T), `sum_v p_v^2 (ln p_v + H)` (arXiv:2510.10150)",
    "tempered_logp": "(B, T) nats, the log-prob at the temperature that is the argument",
    "collision": "(B, T), the probability that two draws are the same token",
    "log_mass": "(B, T) nats, the log of the sum of the probabilities to the power that is the argument",
    "reference_weights": "the reference's weights in the engine while a source of samples asks for them",
    "label": "(N,) 1 desirable, 0 undesirable",
    "margin": "(N,) score of the chosen completion minus that of the rejected one",
    "p_chosen": "(N,) probability that the chosen completion is better",
    "previous_logp": "(N,) nats, log-probs of the frozen previous iterate",
    "column": "(N,) the data's column that is the argument",
    "mismatched": "log-probs of prompts with other prompts' completions, for KTO's reference point",
    "z0": "() nats, KTO's reference point (arXiv:2402.01306)",
    "desirable_share": "() share of desirable completions in the optimizer batch",
    "mean_margin": "() nats, mean margin of the optimizer batch (arXiv:2503.17928)",
    "mean_chosen_length": "() scored tokens per chosen completion of the optimizer batch",
    "mean_length": "() scored tokens per completion of the optimizer batch",
    "target_tokens_per_example": "() scored target-language tokens per row (arXiv:2505.14297)",
    "group_size": "(N,) completions of the row's prompt in the optimizer batch",
    "reward_softmax": "(N,) softmax of the labels over the completions of a prompt (arXiv:2402.05369)",
}
# An argument follows the word: "policy_loss:clip".
TRAITS: Final[Mapping[str, str]] = {
    "groupless": "an advantage that needs no second completion of a prompt",
    "no_signal": "an advantage that is zero everywhere",
    "reward_free": "reads no reward; a policy loss with it has a gradient where the advantage is 0",
    "owns_clipping": "a policy loss that defines the clipping rule",
    "sequence_level": "a policy loss with one ratio per sequence",
    "acts_on_marks": "a policy loss with a gradient where `batch.extra` is not 0, whatever the advantage",
    "off_policy_only": "changes nothing with one update per rollout",
    "token_level": "a control that gives the tokens of a sequence different weights",
    "per_update": "a control that runs on each optimizer batch rather than once per step",
    "needs_correct": "needs a reward that reports correctness",
    "fraction": "the hyperparameter that is the argument is above 0 and at most 1",
    "same_as_policy_loss": "the hyperparameter that is the argument must equal that of the policy loss",
    "policy_loss": "made for the policy loss that is the argument",
    "control": "needs the control that is the argument",
    "aggregate": "exact under the aggregate that is the argument",
    "loss_term": "marks tokens for the term that is the argument",
    "extra_samples": "works on rows of the source that is the argument",
    "trains": "a source whose rows are trained on",
    "for_advantage": "a source whose rows only an advantage that reads `source` can use",
    "gives_history": "a coefficient that gives its term the input `history`",
    "gives_smoothing": "a coefficient that gives its term the input `smoothing`",
    "pairs": "a preference loss on pairs",
    "labels": "a preference loss on single completions with labels",
    "scalar_head": "a preference loss that trains a scalar head",
    "reference_free": "a preference loss without a reference model",
    "previous_policy": "a preference loss that compares with the policy which sampled the pairs",
    "margins": "a preference loss whose data must have score differences or probabilities",
    "gamma_required": "a preference loss whose hyperparameter gamma has no usable default",
    "whole_groups": "a preference loss that needs all completions of a prompt in one optimizer batch",
    "rewards": "an environment that gives rewards of its own",
}
_NOW = "_now"


def unknown_words(needs: Set[str], traits: Set[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """(word, the table that lacks it) of everything declared that nothing computes or reads."""
    for need in sorted(needs):
        word = need.partition(":")[0]
        if word not in NEEDS and word.removesuffix(_NOW) not in NEEDS:
            yield word, NEEDS
    for trait in sorted(traits):
        word = trait.partition(":")[0]
        if word not in TRAITS:
            yield word, TRAITS
