"""What crosses between processes as arrays is on the other side what it was."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings

from rltrain.checkpoint.journal import EvaluationRecord, StepHeader, StepRecord
from rltrain.process import ALONE, Process
from rltrain.reward.score import Episode, Score
from rltrain.rollout.packed import (
    pack_groups,
    pack_requests,
    unpack_groups,
    unpack_requests,
    unpack_sampled,
)
from rltrain.train.journaled import share_record
from rltrain.types.samples import Completion, Prompt, Request, RolloutGroup, Sampling, ScoredGroup, Span
from support.fake_pool import Ranks, pickle_packed
from support.sample_strategies import scored_groups

HEADER = StepHeader(3, 2, "w", "o", {}, 5, 2, [1, 0], {"rollout": 0.25}, {"control": 1.5})


def test_packed_groups_are_what_they_were() -> None:
    known = Prompt("a", (1, 2), "text", {"answer": 3})
    played = Prompt("a", (1, 2, 3), "another text under the same id")
    episode = Episode(1.0, {"won": 1.0}, ("move",))
    groups = [
        ScoredGroup(
            4,
            known,
            (
                Completion(
                    (5, 6, 7),
                    (-0.1, -1e-30, -3.0000000000000004),
                    "stop",
                    "\ud800",
                    (Span(0, 3, 7),),
                    worker="w",
                ),
                Completion(
                    (8, 9),
                    (-1.0, -2.0),
                    "aborted",
                    "",
                    (Span(0, 1, 6), Span(1, 2, 7)),
                    source=2,
                    turns=((0, 1), (1, 2)),
                    episode=episode,
                ),
            ),
            (Score(1.0, {"f/correct": 1.0}, answer="3"), Score(0.0, ungraded="timeout", why="slow")),
        ),
        ScoredGroup(2, played, (Completion((1,), (-0.5,), "length", "y", (Span(0, 1, 0),)),), (Score(0.5),)),
    ]
    packed = pack_groups(groups, {"a": known})
    assert packed.prompts.prompts == ["a", dataclasses.replace(played, token_ids=())]
    back = unpack_groups(packed, {"a": known})
    assert back == groups
    assert [completion.worker for completion in back[0].completions] == ["w", ""]
    assert back[0].scores[0].answer == "3" and back[0].scores[1].why == "slow"
    assert unpack_groups(pack_groups([], {}), {}) == []


@settings(max_examples=60, deadline=None)
@given(groups=scored_groups())
def test_every_field_crosses(groups: tuple[ScoredGroup, ...]) -> None:
    """Those that ``==`` leaves out among them, and NaN."""
    packed = pack_groups(groups, {})
    pickle_packed(packed)
    assert repr(unpack_groups(packed, {})) == repr(list(groups))
    sampled = [RolloutGroup(group.group, group.prompt, group.completions) for group in groups]
    packed = pack_groups(sampled, {})
    assert packed.scores == [] and repr(unpack_sampled(packed, {})) == repr(sampled)


def test_packed_requests_are_what_they_were() -> None:
    first, second = Prompt("a", (1, 2), "text", {"answer": 3}), Prompt("b", (), "")
    sampling, greedy = Sampling(4, 1.0, 8, seed=1), Sampling(1, 0.0, 8, seed=1, stop=("x",), cache="held out")
    requests = [
        Request(first, sampling, 0, 2),
        Request(second, greedy, 0, 1),
        Request(first, sampling, 2, 2),
    ]
    packed = pack_requests(requests)
    pickle_packed(packed)
    assert packed.samplings == [sampling, greedy]
    assert unpack_requests(packed) == requests
    assert unpack_requests(pack_requests([])) == []
    with pytest.raises(AssertionError, match="Prompt crosses with its tokens"):
        pickle_packed(requests)


KEPT = ScoredGroup(
    0,
    Prompt("a", (1, 2), "text"),
    (Completion((5, 6), (-0.1, -1e-30), "stop", "x", (Span(0, 2, 7),)),),
    (Score(1.0),),
)


@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize(
    "record", [StepRecord(HEADER, (KEPT,)), EvaluationRecord(7, "w", "r", [{"python": 1}], (KEPT,))]
)
def test_what_the_journal_keeps_is_the_same_on_every_rank(record: Any, has_record: bool) -> None:
    ranks = Ranks(2)

    def share(rank: int) -> Any:
        process = Process(rank, 2, gather=functools.partial(ranks.gather, rank), is_main=rank == 0)
        return share_record(process, [record] if has_record and process.is_main else [])

    with ThreadPoolExecutor(2) as threads:
        expected = record if has_record else None
        assert list(threads.map(share, (0, 1))) == [expected, expected]
        assert share_record(ALONE, [record] if has_record else []) is expected
