"""EMPO's reward: clusters of answers that mean the same."""

import math
from itertools import permutations

import pytest

from rltrain.reward.answer_clusters import cluster, first_equal
from rltrain.reward.answer_text import extract_answer
from rltrain.reward.combine import combine
from rltrain.reward.empo import empo
from rltrain.reward.resolve import RewardCall, resolve
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.score_checks import as_score


def inputs(*completions: str, prompt: str = "What is it?") -> RewardInputs:
    return RewardInputs(prompt, completions, (1,) * len(completions), ("stop",) * len(completions), {})


SEVEN = inputs(
    *(f"So it is \\boxed{{{a}}}." for a in ("5", "5", "5", "7", "7", "9")),
    "I will think about it\nand never say.",
)


def values(scores: list[Score]) -> list[float]:
    return [score.value for score in scores]


def test_the_papers_example_comes_out():
    # answers 5 5 5 7 7 9 and none: shares 3/7, 2/7, 1/7; H = -(3 ln 3/7 + 2 ln 2/7 + 2 ln 1/7) / 7
    scores = empo(SEVEN)
    assert values(scores) == pytest.approx([3 / 7] * 3 + [2 / 7] * 2 + [1 / 7, 0])
    assert scores[0].parts["semantic_entropy"] == pytest.approx(1.277034259466139, abs=1e-12)
    assert scores[0].parts["clusters"] == 4
    assert values(empo(SEVEN, empty=None)) == pytest.approx(
        [3 / 7] * 3 + [2 / 7] * 2 + [1 / 7] * 2
    )  # verl's form
    assert empo(SEVEN, empty=-0.5)[6].value == -0.5  # the free-text form


def test_a_unanimous_group_earns_1_and_has_no_entropy():
    scores = empo(inputs("\\boxed{4}", "the answer is 4.", "4"))
    assert values(scores) == [1, 1, 1]
    assert scores[0].parts["semantic_entropy"] == 0
    assert math.copysign(1, scores[0].parts["semantic_entropy"]) == 1


def test_notation_does_not_split_a_cluster():
    scores = empo(inputs("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "The answer is 1/2", "\\boxed{2}"))
    assert values(scores) == [0.75, 0.75, 0.75, 0.25]
    assert [score.answer for score in scores] == ["\\frac{1}{2}"] * 3 + ["2"]


def test_the_order_of_completions_does_not_matter():
    said = ["\\boxed{1}", "\\boxed{2}", "\\boxed{1}", "so\nno answer"]
    for order in permutations(range(4)):
        got = values(empo(inputs(*(said[i] for i in order))))
        assert got == [[0.5, 0.25, 0.5, 0.0][i] for i in order]


@pytest.mark.parametrize("size", [2, 3, 6, 7, 10, 14, 21, 29, 30])
def test_all_distinct_is_counted_and_not_compared_as_logarithms(size: int):
    # for these sizes the sum of -1/G ln 1/G differs from ln G in the last digit
    group = inputs(*(str(number) for number in range(size)))
    assert values(empo(group)) == [0.0] * size
    assert values(empo(group, all_distinct="keep")) == [1 / size] * size


def test_two_completions_without_an_answer_are_not_one_cluster():
    scores = empo(inputs("let me\nsee", "let me\nthink", "3", "3"))
    assert values(scores) == [0, 0, 0.5, 0.5]
    assert scores[0].parts["clusters"] == 3
    assert [score.answer for score in scores] == [None, None, "3", "3"]
    assert values(empo(inputs("let me\nsee", "let me\nthink"))) == [0, 0]


def test_filters_silence_the_whole_prompt():
    # shares 1/2, 1/4, 1/4: H = 1.5 ln 2 = 1.04
    group = inputs("1", "1", "2", "3")
    assert values(empo(group, min_share=0.6)) == [0.0] * 4
    assert values(empo(group, min_share=0.5)) == [0.5, 0.5, 0.25, 0.25]
    assert values(empo(group, entropy_low=1.0, entropy_high=1.1)) == [0.5, 0.5, 0.25, 0.25]
    assert values(empo(group, entropy_high=1.0)) == [0.0] * 4
    assert values(empo(inputs("1", "1"), entropy_low=0.0)) == [0.0] * 2  # solved prompts stop teaching
    assert values(empo(inputs("1", "1"), min_share=1.0)) == [1.0] * 2


def test_copying_the_question_earns_nothing():
    group = inputs("blue", "blue", "red", prompt="Why is the sky BLUE?")
    assert values(empo(group, equivalence="words", copies="zero")) == [0, 0, pytest.approx(1 / 3)]
    assert values(empo(group, equivalence="words")) == pytest.approx([2 / 3, 2 / 3, 1 / 3])


def test_words_are_compared_as_words():
    assert values(empo(inputs("The cat.", "a cat", "dog"), equivalence="words")) == pytest.approx(
        [2 / 3, 2 / 3, 1 / 3]
    )


def test_the_first_representative_wins_where_equivalence_is_not_transitive():
    # a ~ b, b ~ c, not a ~ c: c is compared with a alone, not with b
    near = {("a", "b"), ("b", "c")}
    assert cluster(["a", "b", "c"], first_equal(lambda first, second: (first, second) in near)) == [0, 0, 2]
    assert cluster(
        ["b", "c", "a"],
        first_equal(lambda first, second: (first, second) in near or (second, first) in near),
    ) == [
        0,
        0,
        0,
    ]


def test_equal_texts_are_asked_about_once():
    asked: list[tuple[str, str]] = []
    cluster(["1", "2", "1", "2", "2"], first_equal(lambda *pair: bool(asked.append(pair))))
    assert asked == [("1", "2")]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("42", "42"),
        ("so \\boxed{ 1 + 2 } or \\boxed{x\n y}", "1 + 2, x y"),
        ("so \\boxed{ 1 + 2 }. No, \\boxed{x\n y}", "x y"),
        ("The answer is $7$.", "7"),
        ("so .5.", "so .5"),
        ("\\boxed{.5}", ".5"),
        ("long text\nmore of it\n#### 12", "12"),
        ("<think>1 or 2?</think><answer> 2 </answer>", "2"),
        ("it goes on\nand on", None),
        ("x" * 80, None),
        ("", None),
        ("\\boxed{}", None),
    ],
)
def test_where_an_answer_is_found(completion: str, answer: str | None):
    assert extract_answer(completion) == answer


def test_answers_travel_with_scores():
    call = RewardCall("math_answer", 1.0, {})
    [score] = resolve(call)(RewardInputs("p", ("\\boxed{3}",), (1,), ("stop",), {"answer": "4"}))
    assert score.answer == "3" and score.value == 0.0
    assert (
        combine(
            ["a", "b", "c"], [1.0, 1.0, 1.0], [Score(0.0), Score(1.0, answer="x"), Score(2.0, answer="y")]
        ).answer
        == "x"
    )
    assert as_score(Score(1.0, answer="z"), "mine").answer == "z"
    assert resolve(RewardCall("empo", 1.0, {})).scope == "group"
