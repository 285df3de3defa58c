"""Samples of a policy that learns from judged completions: how uncertain it is about its own tokens, and how
many it writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.protocols import RolloutEngine
from rltrain.report.statistics import Estimate, clustered_average
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.packed import pack_groups, unpack_sampled
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Prompt, Sampling
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["OwnSamples"]


@dataclass(frozen=True)
class OwnSamples:
    """Samples the same prompts with the same seed each time.

    The engine has weights during ``measure`` only.
    """

    engine: RolloutEngine
    sync: Sync
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    deadline: Deadline = no_deadline

    def measure(self, learner: PreferenceLearner) -> dict[str, Estimate]:
        """Estimates for the current weights, by name: "sampled_entropy", nats, mean over the tokens of all
        completions; "sampled_tokens", mean over completions. Every rank samples its share and all return the
        same result.
        """
        self.sync.push(learner.weights, learner.version, expect_change=False)
        share = self.prompts[learner.rank :: learner.world_size]
        sampled = sample_groups(self.engine, share, self.sampling, learner.version, self.deadline)
        groups = sampled
        if learner.world_size > 1:  # completions cross between processes as arrays
            parts = learner.gather([pack_groups(sampled, {})])
            groups = [group for part in parts for group in unpack_sampled(part, {})]
        self.sync.verify(every=True)
        self.sync.sleep()

        samples = [
            (group.prompt, completion)
            for group in sorted(groups, key=lambda group: group.prompt.id)
            for completion in group.completions
        ]
        rows = TokenRows(
            tuple(prompt.token_ids for prompt, _ in samples),
            tuple(completion.token_ids for _, completion in samples),
        )
        _, entropy = learner.log_probs_and_entropy(rows, sides=1)
        assert entropy is not None  # a model that samples has a distribution over tokens

        ids = [prompt.id for prompt, _ in samples]
        tokens = [float(len(completion.token_ids)) for _, completion in samples]
        cluster = [sorted(set(ids)).index(prompt_id) for prompt_id in ids]
        seed = stable_hash("bootstrap", len(samples))
        return {
            "sampled_entropy": clustered_average(entropy.tolist(), cluster, counts=tokens, seed=seed),
            "sampled_tokens": clustered_average(tokens, cluster, seed=seed),
        }
