"""Sampling, grading and dynamic sampling, with an engine and a grader of ten lines each."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest

from rltrain.process import Process
from rltrain.reward.score import RewardInputs, Score
from rltrain.rollout.collate import collate
from rltrain.rollout.colocated import ColocatedRollouts, GradedSampler
from rltrain.rollout.grading import correctness, is_informative
from rltrain.rollout.packed import PackedGroups
from rltrain.types.samples import Completion, Prompt, Sampling, ScoredGroup, Span
from support.samplers import EchoSampler


class CountGrader:
    """Prompt k gets its first k completions right: prompt 0 is all wrong, prompt n all right."""

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        return [
            [
                Score(float(i < int(g.prompt)), {"correct": float(i < int(g.prompt))})
                for i in range(len(g.completions))
            ]
            for g in groups
        ]


class Endless:
    """Prompt indices 0, 1, 2, ... in steps of ``size``, modulo 5."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def next(self) -> list[int]:
        self.at += self.size
        return [i % 5 for i in range(self.at - self.size, self.at)]


def nothing() -> None:
    """These samplers have neither weights nor memory."""


def source_of(groups_per_step: int, max_rounds: int, rank: int = 0, ranks: int = 1) -> ColocatedRollouts:
    prompts = [Prompt(str(i), (i + 1,), str(i)) for i in range(5)]
    sampling = Sampling(n=4, temperature=1.0, max_tokens=4, seed=7)
    graded = GradedSampler(EchoSampler(), CountGrader(), Process(rank, ranks))
    return ColocatedRollouts(
        graded,
        Endless(groups_per_step),  # type: ignore[arg-type]
        prompts,
        sampling,
        groups_per_step,
        max_rounds,
        verify=nothing,
        put_to_sleep=nothing,
        close_engine=nothing,
    )


def test_one_round_trains_on_whatever_was_sampled() -> None:
    rollouts = source_of(groups_per_step=5, max_rounds=1).take(step=1, version=3)
    assert [group.prompt.id for group in rollouts.groups] == ["0", "1", "2", "3", "4"]
    assert rollouts.correct_counts == (0, 1, 2, 3, 4)
    assert rollouts.groups[0].completions[0].versions == (Span(0, 1, 3),)


def test_dynamic_sampling_replaces_groups_that_are_all_right_or_all_wrong() -> None:
    # Of prompts 0..4 with 4 completions, 1, 2 and 3 are informative; two rounds of five give six, and five
    # are needed.
    rollouts = source_of(groups_per_step=5, max_rounds=4).take(step=1, version=0)
    assert [group.prompt.id for group in rollouts.groups] == ["1", "2", "3", "1", "2"]
    assert (rollouts.rounds, rollouts.generated_groups) == (2, 10)
    assert len({group.group for group in rollouts.groups}) == 5


def test_dynamic_sampling_stops_after_max_rounds_and_trains_on_what_there_is() -> None:
    rollouts = source_of(groups_per_step=1, max_rounds=2).take(step=1, version=0)
    assert (rollouts.rounds, [group.prompt.id for group in rollouts.groups]) == (2, ["1"])
    nothing = source_of(groups_per_step=1, max_rounds=2)
    nothing.order = Endless(0)  # type: ignore[assignment]
    nothing.order.next = lambda: [0]  # type: ignore[method-assign]
    assert [group.prompt.id for group in nothing.take(step=1, version=0).groups] == ["0"]


def test_steps_and_rounds_sample_with_seeds_of_their_own() -> None:
    source = source_of(groups_per_step=5, max_rounds=3)
    source.take(step=1, version=0)
    source.take(step=2, version=0)
    assert isinstance(source.graded.sampler, EchoSampler)
    seeds = [sampling.seed for _, sampling, _ in source.graded.sampler.asked]
    assert len(seeds) == len(set(seeds)) == 4


def test_ranks_take_disjoint_shares_with_one_numbering() -> None:
    first = source_of(groups_per_step=5, max_rounds=1, rank=0, ranks=2).take(1, 0).groups
    second = source_of(groups_per_step=5, max_rounds=1, rank=1, ranks=2).take(1, 0).groups
    assert [group.group for group in first] == [0, 2, 4]
    assert [group.group for group in second] == [1, 3]


def test_groups_cross_between_ranks_as_arrays() -> None:
    """A step's tokens would be millions of Python numbers, each pickled by itself."""
    crossed: list[Any] = []

    def gather(items: list[Any]) -> list[Any]:
        crossed.extend(items)
        return [pickle.loads(pickle.dumps(item)) for item in crossed]

    expected = source_of(groups_per_step=5, max_rounds=1).take(1, 0).groups
    ranks = [source_of(groups_per_step=5, max_rounds=1, rank=rank, ranks=2) for rank in (0, 1)]
    for source in ranks:
        process = dataclasses.replace(source.graded.process, gather=gather)
        source.graded = dataclasses.replace(source.graded, process=process)
    ranks[0].take(1, 0)
    assert ranks[1].take(1, 0).groups == expected
    assert [type(item) for item in crossed] == [PackedGroups, PackedGroups]


def group_of(
    scores: Sequence[Score], finish: str = "stop", turns: tuple[tuple[int, int], ...] = ()
) -> ScoredGroup:
    completion = Completion((5, 6, 7), (-1.0, -2.0, -3.0), finish, "x", (Span(0, 3, 4),), turns=turns)  # type: ignore[arg-type]
    return ScoredGroup(9, Prompt("p", (1, 2), "p"), (completion,) * len(scores), tuple(scores))


def test_a_penalised_reward_does_not_make_a_group_informative() -> None:
    # Both wrong, rewards differ by a length penalty: raw correctness decides.
    wrong = group_of([Score(0.0, {"math_answer/correct": 0.0}), Score(-0.5, {"math_answer/correct": 0.0})])
    assert correctness(wrong) == [False, False]
    assert not is_informative(wrong)
    assert is_informative(
        group_of([Score(0.0), Score(-0.5)])
    )  # nothing reports correctness: rewards that differ


def test_ungraded_and_aborted_rows_are_masked_out_whole_with_nan_for_a_reward() -> None:
    _, batch = collate(
        [group_of([Score(1.0), Score(0.0, ungraded="timeout")]), group_of([Score(1.0)], finish="aborted")]
    )
    assert batch.mask.any(dim=1).tolist() == [True, False, False]
    assert [math.isnan(r) for r in batch.rewards.tolist()] == [False, True, True]


def test_masks_come_from_lengths_and_turns() -> None:
    short = Completion((5,), (-1.0,), "stop", "x", (Span(0, 1, 4),))
    group = ScoredGroup(0, Prompt("p", (1,), "p"), (short, short), (Score(1.0), Score(0.0)))
    rows, batch = collate([group_of([Score(1.0)], turns=((0, 1), (2, 3))), group])
    assert batch.mask.tolist() == [[True, False, True], [True, False, False], [True, False, False]]
    assert rows.completions == ((5, 6, 7), (5,), (5,))
    assert batch.rollout_logp is not None
    assert batch.rollout_logp[0].tolist() == [-1.0, -2.0, -3.0]
    assert batch.version.tolist() == [[4] * 3] * 3 and batch.oldest.tolist() == [4, 4, 4]


def test_a_step_without_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="without a single completion"):
        collate([])
