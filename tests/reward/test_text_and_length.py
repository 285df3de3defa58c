"""String rewards and the length penalty."""

import pytest

from rltrain.reward.combine import combine
from rltrain.reward.length import characters, length
from rltrain.reward.score import RewardInputs
from rltrain.reward.text import answer_format, choice, exact, last_number


def inputs(*completions: str, counts: tuple[int, ...] = (), **columns: object) -> RewardInputs:
    return RewardInputs(
        "p", completions, counts or (1,) * len(completions), ("stop",) * len(completions), columns
    )


def values(scores):
    return [score.value for score in scores]


def test_exact_compares_stripped_strings_and_numbers_only_on_request():
    row = inputs(" 1000 ", "1,000.0", "1000.5", answer=1000)
    assert values(exact(row)) == [1, 0, 0] and values(exact(row, numbers=True)) == [1, 1, 0]
    assert values(exact(inputs("Paris", "paris", answer="Paris"))) == [1, 0]
    assert values(exact(inputs("Paris", "paris", answer="Paris"), ignore_case=True, wrong=-1.0)) == [1, 1]


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("41", "41"),
        ("27 + 14 = 41.", "41"),
        ("27 + 14", "14"),  # the question repeated, which equals its answer
        ("To add 27 + 14, we need to find a common", "14"),
        ("it is 41, not 42", "42"),
        ("55-14=-41", "-41"),
        ("x1-41", "41"),
        ("(3)-41", "41"),
        ("1,041", "1041"),
        ("41.50", "41.50"),
        ("forty-one", None),
    ],
)
def test_the_last_number_is_the_answer(completion, number):
    (score,) = last_number(inputs(completion, answer="41"))
    assert score.answer == number
    assert score.value == score.parts["correct"] == float(number == "41")


def test_the_last_number_is_compared_as_a_number_and_the_reference_must_hold_one():
    row = inputs("It is 1041.0", "-1,041", answer="#### 1,041")
    assert values(last_number(row, wrong=-1.0)) == [1, -1]
    with pytest.raises(ValueError, match=r"answer 'Paris' holds no number; use math_answer or exact"):
        last_number(inputs("41", answer="Paris"))


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("The answer is (B).", "B"),
        ("\\boxed{B}", "B"),
        ("$\\boxed{\\text{(B)}}$", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("(B) Paris", "B"),
        ("B) Paris", "B"),
        ("A is tempting, but so\n**B**", "B"),
        ("Answer: B", "B"),
        ("First the answer is A. No: the answer is C", "C"),
        ("I considered (A) and settle on (B)", "B"),
        ("<think>the answer is A</think>The answer is B", "B"),
        ("the answer is a cat", None),
        ("The answer is A cat", None),
        ("Because of it", None),
        ("\\boxed{Be}", None),
        ("E", None),
    ],
)
def test_the_chosen_letter(completion, letter):
    right = [choice(inputs(completion, answer=gold))[0] for gold in "ABCD"]
    assert [score.value for score in right] == [float(gold == letter) for gold in "ABCD"]
    assert right[0].parts["answered"] == float(letter is not None)


def test_choice_takes_its_letters_from_the_recipe_and_refuses_other_golds():
    assert values(choice(inputs("The answer is E", answer="(E)"), letters="ABCDE")) == [1]
    with pytest.raises(ValueError, match=r"one of the letters ABCD, got 'E'"):
        choice(inputs("E", answer="E"))


def test_format_wants_each_tag_once_and_in_order():
    row = inputs(
        "<think>a</think> <answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><answer>b",
    )
    assert values(answer_format(row, tags=["think", "answer"])) == [1, 0, 0, 0, 0]


def test_format_matches_all_of_a_completion_or_any_part_of_it():
    row = inputs("x = 12\n", "so x = 12", "x =")
    assert values(answer_format(row, regex=r"x = \d+")) == [1, 0, 0]
    assert values(answer_format(row, regex=r"x = \d+", match="search", wrong=-0.5)) == [1, 1, -0.5]
    with pytest.raises(ValueError, match="nothing is required"):
        answer_format(row)
    with pytest.raises(ValueError, match="not a regular expression"):
        answer_format(row, regex="(")


def test_the_overlong_penalty_has_the_papers_and_the_released_numbers():
    # DAPO's 16384 expected + 4096 buffer: zero to 16384, half way at 18432, -1 at 20480; (21000 - 16384) /
    # 4096 = 1.126953125
    row = inputs("", "", "", "", "", counts=(16000, 16384, 18432, 20480, 21000))
    paper = length(row, max_tokens=20480, buffer_tokens=4096)
    released = length(row, max_tokens=20480, buffer_tokens=4096, form="released")
    assert values(paper) == pytest.approx([0.0, 0.0, -0.5, -1.0, -1.0], abs=1e-6)
    assert values(released) == pytest.approx([0.0, 0.0, -0.5, -1.0, -1.126953125], abs=1e-6)
    assert values(length(row, max_tokens=20480, buffer_tokens=4096, factor=0.5))[3] == -0.5
    assert [score.parts["over_length"] for score in paper] == [0, 0, 1, 1, 1]


def test_the_overlong_penalty_needs_both_sizes():
    with pytest.raises(ValueError, match=r"max_tokens is None and buffer_tokens 4"):
        length(inputs("a"), buffer_tokens=4)
    with pytest.raises(ValueError, match=r"0 < buffer_tokens <= max_tokens"):
        length(inputs("a"), max_tokens=3, buffer_tokens=4)


def test_characters_cost_what_superhf_takes_off():
    row = inputs("4", "four is 4", "", "\u00e9\U0001f600", answer="4")
    assert values(characters(row)) == [-1, -9, 0, -2]
    sums = [
        combine(["exact", "characters"], [1.0, 0.01], pair)
        for pair in zip(exact(row), characters(row), strict=True)
    ]
    assert values(sums) == pytest.approx([0.99, -0.09, 0, -0.02])
