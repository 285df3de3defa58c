"""Episodes: which tokens the policy is fed, what of a row is its own, and when an episode ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
import torch

from rltrain.reward.score import Score
from rltrain.rollout.collate import collate
from rltrain.rollout.environments import Step, Task
from rltrain.rollout.environments.episodes import EpisodePlayer
from rltrain.rollout.environments.pool import Failure, Opening
from rltrain.rollout.grading import reward_inputs, score_groups
from rltrain.rollout.groups import sample_groups
from rltrain.types.samples import Completion, Prompt, Request, RolloutGroup, Sampling, Span
from support.samplers import EchoSampler

EOS = 1


class Engine(EchoSampler):
    """Writes three tokens that tell the length of the prompt and the sample apart."""

    def __init__(self, finish: str = "stop") -> None:
        super().__init__()
        self.finish = finish

    def completion(self, request: Request, sample: int, policy: int) -> Completion:
        tokens = (100 + sample, 200 + len(request.prompt.token_ids), EOS)
        versions = (Span(0, 3, policy),)
        source = request.sampling.source
        return Completion(
            tokens, (-0.5, -0.25, -0.125), cast(Any, self.finish), f"text{sample}", versions, source
        )


class Pool:
    """Done after ``turns`` turns; ``fail`` maps (episode, turn) to a reason, turn 0 being the reset."""

    def __init__(
        self,
        turns: int = 2,
        fail: Mapping[tuple[int, int], str] | None = None,
        openings: Sequence[str | None] = (None,),
    ) -> None:
        self.turns, self.fail, self.openings = turns, fail or {}, openings
        self.said: dict[int, list[str]] = {}
        self.seeds: list[int] = []
        self.waiting: list[tuple[int, Opening | Step | Failure]] = []
        self.ended = 0

    def begin(self, tasks: Sequence[tuple[Task, int]]) -> None:
        self.said = {number: [] for number in range(len(tasks))}
        self.seeds = [seed for _, seed in tasks]
        for number in self.said:
            failure = self.fail.get((number, 0))
            opening = Opening(self.openings[number % len(self.openings)])
            self.waiting.append((number, opening if failure is None else Failure(failure, "no")))

    def step(self, texts: Mapping[int, str]) -> None:
        self.waiting += [(number, self._answer(number, text)) for number, text in texts.items()]

    def answers(self) -> Iterator[tuple[int, Opening | Step | Failure]]:
        while self.waiting:
            yield self.waiting.pop()  # the last first, because no caller may rely on an order

    def _answer(self, number: int, text: str) -> Step | Failure:
        self.said[number].append(text)
        turn = len(self.said[number])
        if (number, turn) in self.fail:
            return Failure(self.fail[number, turn], "no")
        return Step(f"seen {turn}", turn == self.turns, reward=0.25, parts={"turn": float(turn)})

    def end(self) -> None:
        self.ended += 1

    def close(self) -> None:
        self.ended = -1


class Speech:
    """An observation is four tokens: the end of the turn unless it ended itself, two, and the start
    of the next turn.
    """

    def opening(self, text: str) -> tuple[str, tuple[int, ...]]:
        return f"<{text}>", (50, 51)

    def observation(self, text: str, last: int) -> tuple[int, ...]:
        return (*(() if last == EOS else (EOS,)), 60, 61, int(text.split()[1]))


PROMPTS = [Prompt("a", (5, 6, 7), "question a", {"answer": "1"}), Prompt("b", (8,), "question b")]


def build(engine: Engine, pool: Pool, **sizes: int) -> EpisodePlayer:
    limits = {"max_turns": 4, "turn_tokens": 5} | sizes
    return EpisodePlayer(
        engine, pool, Speech(), decode=lambda ids: " ".join(map(str, ids)), filler=0, **limits
    )  # fmt: skip


def play(
    pool: Pool | None = None, engine: Engine | None = None, n: int = 2, max_tokens: int = 40, **sizes: int
) -> list[RolloutGroup]:
    player = build(engine or Engine(), pool or Pool(), **sizes)
    return sample_groups(player, PROMPTS, Sampling(n, 1.0, max_tokens, seed=3, source=1), 7)


def rows(groups: Sequence[RolloutGroup]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def test_a_row_is_turns_and_observations_and_says_which_is_which() -> None:
    completion = play()[0].completions[1]
    # turn 1 from a prompt of 3 tokens, observation 1, turn 2 from 3 + 3 + 3 = 9 tokens
    assert completion.token_ids == (101, 203, EOS, 60, 61, 1, 100, 209, EOS)
    assert (
        completion.turns == ((0, 3), (6, 9))
        and completion.spans == completion.turns
        and completion.sampled_tokens == 6
    )
    assert completion.logprobs == (-0.5, -0.25, -0.125, 0, 0, 0, -0.5, -0.25, -0.125)
    assert (completion.finish, completion.versions, completion.source) == ("stop", (Span(0, 9, 7),), 1)
    assert completion.episode is not None
    assert (completion.episode.reward, completion.episode.parts, completion.episode.turns) == (
        0.5,
        {"turn": 2.0},
        ("text1", "text0"),
    )


def test_the_prompt_of_a_turn_is_the_row_so_far() -> None:
    engine = Engine()
    groups = play(Pool(turns=3), engine)
    for index, completion in enumerate(rows(groups)):
        task = PROMPTS[index // 2]
        for turn, (start, _) in enumerate(completion.turns):
            fed = engine.asked[turn][0][index // 2 if turn == 0 else index]
            assert fed.token_ids == (*task.token_ids, *completion.token_ids[:start])
    assert [len(prompts) for prompts, _, _ in engine.asked] == [
        2,
        4,
        4,
    ]  # one prefill per task in the first turn


def test_each_prompt_sample_and_turn_has_a_seed_of_its_own() -> None:
    engine, pool = Engine(), Pool(turns=3)
    play(pool, engine)
    later = {(prompt.id, sampling.seed) for prompts, sampling, _ in engine.asked[1:] for prompt in prompts}
    assert len(later) == 8  # 2 tasks x 2 samples x 2 turns
    assert len({sampling.seed for _, sampling, _ in engine.asked}) == 3
    assert len(set(pool.seeds)) == 4
    assert [sampling.max_tokens for _, sampling, _ in engine.asked] == [5, 5, 5]
    assert {version for _, _, version in engine.asked} == {7}


def test_one_turn_is_what_the_engine_alone_would_have_written() -> None:
    plain_engine = Engine()
    expected = sample_groups(plain_engine, PROMPTS, Sampling(2, 1.0, 5, seed=3, source=1), 7)
    engine = Engine()
    groups = play(Pool(turns=1), engine)
    assert engine.asked == plain_engine.asked
    assert [completion.token_ids for completion in rows(groups)] == [
        completion.token_ids for completion in rows(expected)
    ]


def test_a_group_cut_into_requests_is_played_as_a_whole_one() -> None:
    sampling = Sampling(4, 1.0, 40, seed=3, source=1)
    pool, cut_pool = Pool(turns=3), Pool(turns=3)
    groups = sample_groups(build(Engine(), pool), PROMPTS, sampling, 7)
    parts = [Request(prompt, sampling, first, 2) for prompt in PROMPTS for first in (0, 2)]
    answers = sorted(build(Engine(), cut_pool).sample(parts, 7), key=lambda answer: answer.request)
    for place, group in enumerate(groups):
        assert group.completions == answers[2 * place].completions + answers[2 * place + 1].completions
    assert cut_pool.seeds == pool.seeds  # an environment's, too, are those of the sample


def test_an_episode_ends_unfinished_after_its_last_turn() -> None:
    completion = rows(play(Pool(turns=9), max_turns=2))[0]
    assert (completion.finish, len(completion.turns), len(completion.token_ids)) == (
        "length",
        2,
        9,
    )  # the second observation is nobody's to read
    assert completion.episode is not None and completion.episode.reward == 0.5


@pytest.mark.parametrize(("max_tokens", "turns"), [(11, 2), (10, 1), (17, 3), (16, 2)])
def test_an_episode_ends_where_another_turn_might_not_fit(max_tokens: int, turns: int) -> None:
    # After k turns a row has 6 k - 3 tokens; the observation and a turn of up to 5 take 8 more: 11 for the
    # second, 17 for the third.
    for completion in rows(play(Pool(turns=9), max_tokens=max_tokens)):
        assert (completion.finish, len(completion.turns)) == ("length", turns)
        assert len(completion.token_ids) <= max_tokens


def test_a_turn_that_was_cut_gets_its_end_from_the_template() -> None:
    class Cut(Engine):
        def completion(self, request: Request, sample: int, policy: int) -> Completion:
            return Completion((100, 101), (-1.0, -1.0), "length", "", (Span(0, 2, policy),))

    completion = rows(play(engine=Cut()))[0]
    assert completion.token_ids == (100, 101, EOS, 60, 61, 1, 100, 101)
    assert completion.turns == ((0, 2), (6, 8)) and completion.finish == "length"


def test_what_the_environment_asks_is_the_group_s_prompt() -> None:
    engine = Engine()
    groups = play(Pool(openings=["look"]), engine)
    assert [group.prompt for group in groups] == [
        Prompt("a", (50, 51), "<look>", {"answer": "1"}),
        Prompt("b", (50, 51), "<look>"),
    ]
    assert engine.asked[0][0] == tuple(group.prompt for group in groups)


def test_samples_that_are_asked_different_things_are_no_group() -> None:
    failures = [
        completion.episode.failure if completion.episode else None
        for completion in rows(play(Pool(openings=["look", "listen"])))
    ]
    assert failures[0] is None and failures[1] is not None and "different things" in failures[1]


def test_a_failed_environment_is_an_ungraded_row_and_no_other_row_s_business() -> None:
    class Grader:
        def score(self, groups: Sequence[Any]) -> list[list[Score]]:
            return [[Score(1.0, {"correct": 1.0}) for _ in group.completions] for group in groups]

    groups = play(Pool(fail={(0, 0): "timeout", (2, 2): "died"}))
    scored = score_groups(groups, Grader())
    scores = [score for group in scored for score in group.scores]
    assert [score.ungraded for score in scores] == [
        "environment_timeout: no",
        None,
        "environment_died: no",
        None,
    ]
    _, batch = collate(scored)
    assert batch.rewards.isnan().tolist() == [True, False, True, False]
    assert batch.mask.any(1).tolist() == [False, True, False, True]
    never, half = rows(groups)[0], rows(groups)[2]
    assert (never.token_ids, never.finish) == ((0,), "aborted")
    assert (len(half.turns), half.finish) == (2, "aborted")


def test_observations_are_masked_and_turns_are_steps() -> None:
    groups = play(Pool(turns=2))
    _, batch = collate(score_groups(groups, cast(Any, _Everything())))
    assert batch.mask[0].tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert batch.step_id is not None and batch.step_id[0].tolist() == [0, 0, 0, -1, -1, -1, 1, 1, 1]
    assert batch.rollout_logp is not None and batch.rollout_logp[0][~batch.mask[0]].abs().sum() == 0
    torch.testing.assert_close(batch.rollout_logp[0][batch.mask[0]], torch.tensor([-0.5, -0.25, -0.125] * 2))


class _Everything:
    def score(self, groups: Sequence[Any]) -> list[list[Score]]:
        return [[Score(1.0) for _ in group.completions] for group in groups]


def test_graders_read_the_last_turn_and_the_environment_s_verdict() -> None:
    inputs = reward_inputs(play()[0])
    assert inputs.completions == ("text0", "text0") and inputs.columns == {"answer": "1"}
    assert [(episode.reward, episode.parts["turn"]) for episode in inputs.episodes] == [(0.5, 2.0)] * 2
    assert reward_inputs(sample_groups(Engine(), PROMPTS[:1], Sampling(2, 1.0, 4, 0), 7)[0]).episodes == ()


def test_no_prompts_are_no_episodes() -> None:
    pool = Pool()
    assert sample_groups(build(Engine(), pool), [], Sampling(2, 1.0, 8, seed=0), 7) == []


def test_closing_ends_the_pool_and_leaves_the_engine_to_its_maker() -> None:
    class Closing(Engine):
        closed = False

        def close(self) -> None:
            self.closed = True

    engine, pool = Closing(), Pool()
    player = build(engine, pool)
    assert player.name == engine.name
    player.close()
    assert pool.ended == -1 and not engine.closed
