"""What the policy writes itself is measured with its own logits, and leaves nothing behind."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltrain.build.offline import build_own_samples
from rltrain.config.schema import LearnerCore, Model, OfflineModel, Optimizer
from rltrain.data.chat import StopTokens
from rltrain.data.preferences import Pair
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.protocols import EngineState
from rltrain.rollout.groups import sample_groups
from rltrain.train.own_samples import OwnSamples
from support.fake_pool import Ranks

TOKENS = 6
PAIRS = [Pair(str(number), (20 + number, 30), (40,), (41,)) for number in range(5)]


@pytest.fixture(scope="module")
def learner(random_model: str) -> PreferenceLearner:
    return make_learner(random_model)


def make_learner(random_model: str) -> PreferenceLearner:
    settings = LearnerCore(optimizer=Optimizer(lr=1e-2))
    return PreferenceLearner(OfflineModel(path=random_model), settings, total_updates=1, seed=0)


def built(model: str, samples: int, learner: PreferenceLearner) -> OwnSamples:
    prompts = [pair.prompt for pair in PAIRS]
    stop_tokens = StopTokens(stop=(1,), pad=0, pad_is_eos=False)
    return build_own_samples(samples, TOKENS, Model(path=model), stop_tokens, prompts, learner, seed=0)


def test_entropy_is_that_of_the_models_logits_on_what_it_wrote(
    random_model: str, learner: PreferenceLearner
) -> None:
    samples = built(random_model, 4, learner)
    assert len(samples.prompts) == 4
    estimates = samples.measure(learner)
    assert samples.engine.state is EngineState.ASLEEP  # the copy of the weights is gone again
    samples.engine.wake()
    samples.engine.load(learner.weights(), 0)
    groups = sample_groups(samples.engine, samples.prompts, samples.sampling, 0)
    samples.engine.sleep()
    model, entropies, tokens = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32), [], []
    for group in groups:
        (completion,) = group.completions
        with torch.no_grad():
            logits = model(torch.tensor([group.prompt.token_ids + completion.token_ids])).logits[
                0, len(group.prompt.token_ids) - 1 : -1
            ]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().sum().item())
        tokens.append(len(completion.token_ids))
    assert estimates["sampled_entropy"].value == pytest.approx(sum(entropies) / sum(tokens), rel=1e-4)
    assert estimates["sampled_tokens"].value == sum(tokens) / 4
    assert (
        estimates["sampled_entropy"].low
        <= estimates["sampled_entropy"].value
        <= estimates["sampled_entropy"].high
    )


def test_the_same_prompts_are_answered_alike_each_time_and_the_callers_random_state_is_left_alone(
    random_model: str, learner: PreferenceLearner
) -> None:
    samples = built(random_model, 100, learner)
    assert len(samples.prompts) == len(PAIRS)  # no more than there are
    before = torch.get_rng_state()
    assert samples.measure(learner) == samples.measure(learner)
    assert torch.equal(before, torch.get_rng_state())


class OfRank:
    """The learner as one of two ranks, which are threads."""

    world_size = 2

    def __init__(self, learner: PreferenceLearner, rank: int, ranks: Ranks) -> None:
        self._learner = learner
        self.rank = rank
        self.gather = functools.partial(ranks.gather, rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)


def test_two_ranks_measure_what_one_does(random_model: str, learner: PreferenceLearner) -> None:
    """What they gather crosses as arrays, or the gather fails. Each rank has a model of its own, as processes
    have.
    """
    expected = built(random_model, 100, learner).measure(learner)
    ranks = Ranks(2)
    learners = [make_learner(random_model) for _ in range(2)]

    def measure(rank: int) -> Any:
        samples = built(random_model, 100, learners[rank])
        return samples.measure(cast("PreferenceLearner", OfRank(learners[rank], rank, ranks)))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(measure, (0, 1))) == [expected, expected]
