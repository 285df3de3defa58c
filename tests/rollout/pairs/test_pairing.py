"""Completions to pairs: who is compared, who is chosen, what is left out; judges and their exchange
symmetry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rltrain.reward.score import Score
from rltrain.rollout.pairs.judges import JudgeContext, ModelJudge, RewardJudge, SelfJudge
from rltrain.rollout.pairs.pairing import (
    Comparison,
    Pairing,
    choose_pairs,
    compare_completions,
    pair_batch,
    usable_places,
)
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Completion, Finish, Prompt, ScoredGroup, Span


def group_of(
    rewards: Sequence[float | None],
    number: int = 0,
    tokens: Sequence[tuple[int, ...]] | None = None,
    finish: Finish = "stop",
):
    ids = tokens or [(place + 1,) for place in range(len(rewards))]
    completions = tuple(
        Completion(
            token_ids,
            (0.0,) * len(token_ids),
            finish,
            "".join(map(str, token_ids)),
            (Span(0, len(token_ids), 0),),
        )
        for token_ids in ids
    )
    scores = tuple(Score(0.0, ungraded="timeout") if value is None else Score(value) for value in rewards)
    return ScoredGroup(number, Prompt(f"p{number}", (7,), "Q"), completions, scores)


def means(**changes: Any) -> JudgeContext:
    def log_probs(rows: TokenRows, by: str) -> torch.Tensor:
        raise AssertionError("not asked for")

    settings: dict[str, Any] = {
        "log_probs": log_probs,
        "render": lambda text: [ord(letter) for letter in text],
        "decode": lambda ids: "Q",
        "word": ord,
        "reward_model": None,
        "rank": 0,
        "ranks": 1,
        "gather": list,
        "max_tokens": 100,
    }
    return JudgeContext(**(settings | changes))


class Listed:
    """A judge with its answers by (first, second)."""

    def __init__(self, answers: dict[tuple[int, int], float]) -> None:
        self.answers, self.asked = answers, list[tuple[int, int]]()

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        self.asked = [(comparison.first, comparison.second) for comparison in comparisons]
        return [self.answers[both] for both in self.asked]


def by_reward(**settings: Any) -> Pairing:
    return Pairing(
        RewardJudge(means()),
        **({"choose": "best_worst", "verdict": "likelier", "tolerance": 0.0, "seed": 0} | settings),
    )


def places(pairing: Pairing, *groups: ScoredGroup, step: int = 1) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in pairing(groups, step).pairs]


def test_the_tournaments_ends_make_the_pair():
    assert places(by_reward(), group_of([0.1, 1.7, -0.4, 0.9])) == [(1, 2)]
    # the second group's rows begin after the four of the first; its ungraded completion takes no part
    assert places(by_reward(), group_of([0, 0, 0, 1], 0), group_of([3, None, 2], 1)) == [(3, 2), (4, 6)]
    # a cycle a > b > c > a leaves nobody on top: a tie, however sure each verdict is
    cycle = Pairing(Listed({(0, 1): 0.9, (0, 2): 0.1, (1, 2): 0.9}), "best_worst", "likelier", 0.0, 0)
    pairs = cycle([group_of([0, 0, 0])], 1)
    assert (len(pairs), pairs.dropped, pairs.compared) == (0, {"tied": 1}, 3)


def test_who_is_compared_follows_the_choice():
    able = [0, 2, 3, 5, 6]
    assert compare_completions("disjoint", able) == [(0, 2), (3, 5)]  # an odd one out
    assert compare_completions("ranked", able) == [(2, 0), (3, 0), (5, 0), (6, 0)]
    assert len(compare_completions("best_worst", able)) == 10
    assert compare_completions("best_worst", [4]) == compare_completions("ranked", []) == []
    assert choose_pairs("ranked", [4], {}) == choose_pairs("best_worst", [], {}) == []


def test_ranked_strengths_come_from_the_common_answer():
    # rates 1/2 (the answer itself), .9, .3: p = sigmoid(logit s_i - logit s_j): .9 against .5 is .9, .5
    # against .3 is .7, .9 against .3 is odds 9 / (3/7) = 21, so 21/22
    strengths = {(i, j): p for i, j, p in choose_pairs("ranked", [0, 1, 2], {(1, 0): 0.9, (2, 0): 0.3})}
    assert strengths == pytest.approx({(1, 0): 0.9, (1, 2): 21 / 22, (0, 2): 0.7})


def test_pairs_that_say_nothing_are_left_out_and_counted():
    identical = group_of([1, 0], tokens=[(5, 6), (5, 6)])
    pairs = by_reward()(
        [identical, group_of([1, 1], 1), group_of([1, 0], 2, finish="aborted"), group_of([None, 1], 3)], 1
    )
    assert (len(pairs), pairs.dropped, pairs.prompts) == (0, {"identical": 1, "tied": 1}, 4)
    unsure = Listed({(0, 1): 0.54, (2, 3): 0.44})
    assert places(Pairing(unsure, "disjoint", "likelier", 0.05, 0), group_of([0, 0, 0, 0])) == [(3, 2)]
    assert usable_places(group_of([None, 1, 2])) == [1, 2]


def test_a_drawn_verdict_is_right_as_often_as_the_judge_is_sure():
    noisy = Pairing(RewardJudge(means(), noise=0.2), "disjoint", "drawn", 0.0, 3)
    groups = [group_of([1, 0], number) for number in range(2000)]
    judged = noisy(groups, 1)
    upright = [pair for pair in judged.pairs if pair.margin == 1]
    assert len(judged) == 2000 and len(upright) / 2000 == pytest.approx(
        0.8, abs=0.03
    )  # 3 standard errors: .027
    assert all(pair.p_chosen == (0.8 if pair.margin == 1 else pytest.approx(0.2)) for pair in judged.pairs)
    assert (
        noisy(groups, 1) == judged and noisy(groups, 2).pairs != judged.pairs
    )  # by step and group, not by who ran before
    ties = noisy([group_of([1, 1], number) for number in range(400)], 1)
    assert 0.4 < sum(pair.chosen % 2 for pair in ties.pairs) / 400 < 0.6  # a tie is drawn like anything else


def test_the_batch_holds_what_losses_read():
    judged = by_reward(choose="disjoint")(
        [group_of([2, 5], 4), group_of([1, 0.5], 9, tokens=[(1, 2, 3), (4,)])], 1
    )
    rows = TokenRows(((7,),) * 4, ((1,), (2,), (1, 2, 3), (4,)))
    lengths = torch.tensor([1, 1, 3, 1])
    assert judged.rows(rows).completions == ((2,), (1, 2, 3), (1,), (4,))
    batch = pair_batch(
        judged, lengths, {"ref_logp": judged.select_sides(torch.tensor([-1.0, -2.0, -3.0, -4.0]))}
    )
    assert (
        batch.prompt.tolist() == [4, 9] and batch.margin is not None and batch.margin.tolist() == [3.0, 0.5]
    )
    assert batch.chosen.length.tolist() == [1, 3] and batch.rejected.length.tolist() == [1, 1]
    assert batch.chosen.ref_logp is not None and batch.chosen.ref_logp.tolist() == [-2.0, -3.0]
    metrics = judged.metrics(lengths)
    assert (metrics["pairs/count"], metrics["pairs/prompts"], metrics["pairs/chosen_longer"]) == (
        2.0,
        1.0,
        0.5,
    )


def test_a_rule_is_as_sure_as_it_says():
    comparison, tie = Comparison(group_of([3.0, 1.0]), 0, 1), Comparison(group_of([1.0, 1.0]), 0, 1)
    assert RewardJudge(means()).prefers([comparison, tie]) == [1.0, 0.5]
    assert RewardJudge(means(), noise=0.1).prefers([comparison, Comparison(comparison.group, 1, 0), tie]) == [
        0.9,
        0.1,
        0.5,
    ]
    assert RewardJudge(means(), scale=0.5).prefers([comparison]) == [pytest.approx(1 / (1 + math.exp(-1.0)))]
    for settings in ({"noise": 0.5}, {"scale": 0.0}, {"scale": 1.0, "noise": 0.1}):
        with pytest.raises(ValueError, match=r"pairs\.judge reward"):
            RewardJudge(means(), **settings)


def test_the_self_judge_hears_both_orders():
    # log-probs that know only the place: A gets ln .7, B ln .1 whatever is asked. Both orders cancel to 1/2.
    def placed(rows: TokenRows, by: str) -> torch.Tensor:
        return torch.tensor(
            [math.log(0.7) if completion == (ord("A"),) else math.log(0.1) for completion in rows.completions]
        )

    comparison = Comparison(group_of([0.0, 0.0], tokens=[(8,), (9,)]), 0, 1)
    assert SelfJudge(means(log_probs=placed)).prefers([comparison]) == [pytest.approx(0.5)]

    # ... and ones that know the answer "9": softmax(ln 4, 0) = .8 for the place where it stands
    def knowing(rows: TokenRows, by: str) -> torch.Tensor:
        assert by == "reference" and rows.prompts[: len(rows) // 2] == rows.prompts[len(rows) // 2 :]
        asked = ["".join(map(chr, prompt)) for prompt in rows.prompts]
        right = ["A" if "A: 9" in text else "B" for text in asked]
        return torch.tensor(
            [
                math.log(4.0) if chr(said[0]) == best else 0.0
                for said, best in zip(rows.completions, right, strict=True)
            ]
        )

    judge = SelfJudge(means(log_probs=knowing), by="reference")
    assert judge.prefers([comparison, Comparison(comparison.group, 1, 0)]) == [
        pytest.approx(0.2),
        pytest.approx(0.8),
    ]
    assert math.isnan(
        SelfJudge(means(max_tokens=5)).prefers([comparison])[0]
    )  # nobody is asked what the policy cannot read
    with pytest.raises(ValueError, match="begin with one token"):
        SelfJudge(means(), first_word="B")
    with pytest.raises(ValueError, match=r"lacks \{second\}"):
        SelfJudge(means(), template="{prompt} {first}")


def test_an_answer_cannot_write_into_the_question():
    asked: list[str] = []

    def record(text: str) -> list[int]:
        asked.append(text)
        return [1] * 200

    evil = ScoredGroup(
        0,
        Prompt("p", (7,), "Q"),
        (
            Completion((1,), (0.0,), "stop", "{second}", (Span(0, 1, 0),)),
            Completion((2,), (0.0,), "stop", "x", (Span(0, 1, 0),)),
        ),
        (Score(0.0),) * 2,
    )
    SelfJudge(means(render=record), template="{prompt}|{first}|{second}").prefers([Comparison(evil, 0, 1)])
    assert asked == ["Q|{second}|x", "Q|x|{second}"]


def number_of(path: str, *, prompt_column: str | None, max_tokens: int) -> Any:
    """A reward model whose number is the sum of what it reads; 99 tells it nothing."""
    del path, prompt_column, max_tokens
    return lambda rows: [
        math.nan
        if 99 in inputs.completion_ids[place]
        else float(sum(inputs.prompt_ids + inputs.completion_ids[place]))
        for inputs, place in rows
    ]


def test_a_reward_models_difference_is_bradley_terrys():
    judge = ModelJudge(means(reward_model=number_of), path="model")
    group = group_of([0.0, 0.0, 0.0], tokens=[(1,), (2, 2), (99,)])
    first, turned, equal, none = judge.prefers(
        [Comparison(group, *both) for both in ((0, 1), (1, 0), (1, 1), (0, 2))]
    )
    assert first == pytest.approx(1 / (1 + math.exp(3))) and first + turned == pytest.approx(
        1
    )  # 7 + 1 against 7 + 4
    assert equal == 0.5 and math.isnan(none)
    # two ranks, each with its share of the completions
    shares: list[list[Any]] = []
    for rank in (0, 1):
        ranked = means(
            rank=rank,
            ranks=2,
            gather=lambda share: shares.append(share) or [np.array([8.0]), np.array([11.0])],
            reward_model=number_of,
        )
        assert ModelJudge(ranked, path="model").prefers([Comparison(group, 0, 1)]) == [first]
    assert [[part.tolist() for part in share] for share in shares] == [[[8.0]], [[11.0]]]
    with pytest.raises(ValueError, match="path is missing"):
        ModelJudge(means())


@pytest.mark.parametrize(
    ("choose", "answers", "expected"),
    [
        ("disjoint", {(0, 1): math.nan}, []),
        (
            "best_worst",
            {(0, 1): math.nan, (0, 2): 0.9, (1, 2): 0.8},
            [(0, 2)],
        ),  # 0.9 against 0.8 and (0.1 + 0.2) / 2
        ("best_worst", {(0, 1): math.nan, (0, 2): math.nan, (1, 2): math.nan}, []),
        ("best_worst", {(0, 1): 0.9, (0, 2): math.nan, (1, 2): math.nan}, [(0, 1)]),
        ("ranked", {(1, 0): math.nan, (2, 0): 0.9}, [(2, 0)]),
        ("ranked", {(1, 0): math.nan, (2, 0): math.nan}, []),
    ],
)
def test_what_nobody_judged_is_left_out_and_counted(
    choose: Any, answers: dict[tuple[int, int], float], expected: list[tuple[int, int]]
):
    group = group_of([0.0] * (2 if choose == "disjoint" else 3))
    judged = Pairing(Listed(answers), choose, "likelier", 0.0, 0)([group], 1)
    assert [(pair.chosen, pair.rejected) for pair in judged.pairs] == expected
    assert dict(judged.dropped) == ({} if expected else {"unjudged": 1})
