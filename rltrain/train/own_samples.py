"""What a policy that learns from judged completions writes itself: how uncertain it is of its tokens,
and how many they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.protocols import RolloutEngine
from rltrain.report.statistics import Estimate, clustered_average
from rltrain.rollout.groups import sample_groups
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Prompt, Sampling
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["OwnSamples"]


@dataclass(frozen=True)
class OwnSamples:
    """Completions of the same prompts with the same seed each time.

    The engine holds weights during ``measure`` only.
    """

    engine: RolloutEngine
    sync: Sync
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    deadline: Deadline = no_deadline

    def measure(self, learner: PreferenceLearner) -> dict[str, Estimate]:
        """With the weights as they are, estimates by name: "sampled_entropy", nats, mean over the tokens of
        all completions; "sampled_tokens", mean over completions. Every rank writes its share and all return
        the same result.
        """
        self.sync.push(learner.weights, learner.version, expect_change=False)
        share = self.prompts[learner.rank :: learner.world_size]
        sampled = sample_groups(self.engine, share, self.sampling, learner.version, self.deadline)
        groups = learner.gather(sampled)
        self.sync.verify(every=True)
        self.sync.sleep()
        written = [
            (group.prompt, one)
            for group in sorted(groups, key=lambda group: group.prompt.id)
            for one in group.completions
        ]
        rows = TokenRows(
            tuple(prompt.token_ids for prompt, _ in written), tuple(one.token_ids for _, one in written)
        )
        _, entropy = learner.log_probs_and_entropy(rows, sides=1)
        assert entropy is not None  # a model that samples has a distribution over tokens
        ids, tokens = [prompt.id for prompt, _ in written], [float(len(one.token_ids)) for _, one in written]
        cluster, seed = [sorted(set(ids)).index(name) for name in ids], stable_hash("bootstrap", len(written))
        return {
            "sampled_entropy": clustered_average(entropy.tolist(), cluster, counts=tokens, seed=seed),
            "sampled_tokens": clustered_average(tokens, cluster, seed=seed),
        }
