r"""``math_answer`` on notations whose verdict can be worked out by hand."""

import random
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rltrain.reward import answer_notation
from rltrain.reward import math_answer as grader
from rltrain.reward.math_answer import compare, is_degenerate, judge, math_answer
from rltrain.reward.score import RewardInputs, Score
from support.reviewed_verdicts import DECIDED, RULES


def inputs(*completions: str, **columns: object) -> RewardInputs:
    count = len(completions)
    return RewardInputs("p", completions, (1,) * count, ("stop",) * count, columns)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("42", "42"),
        ("42", "The answer is \\boxed{42}."),
        ("42", "The answer is $42.$"),
        ("42", "= 42"),
        ("1/2", ".5"),
        ("\\frac{1}{2}", "$\\frac{2}{4}$"),
        ("6r^2-4r-24", "Thus $2(3r^2-2r-12)$"),
        ("2\\sqrt{3}", "2*sqrt(3)"),
        ("x^{10}", "x**10"),
        ("\\text{east}", "Final Answer: The final answer is east. I hope it is correct."),
        ("hello world", "Hello, world!"),
        ("yes", "\\text{Yes.}"),
        ("B", "The answer is (B)."),
        ("\\$36", "36"),
        ("36", "It costs \\$36"),
        ("24{,}000", "24,000"),
        ("1000.99", "1000,99"),
        ("1.5", "1 1/2"),
        ("90", "The angle is [90]."),
        ("26000", "1000(26)"),
        ("-2 + 7i", "-2 + 7i."),
        ("\\cos(x)", "\\sin(90^{\\circ}-x)"),
        ("\\frac{\\sqrt{3}}{2}", "\\sin 60^\\circ"),
        ("4:30 \\text{ p.m.}", "They arrive at \\boxed{16:30}"),
        ("x \\in [-2,7]", "$-2 \\le x \\le 7$"),
        ("\\frac{3}{4}", "\\\\frac{6}{8}"),
        ("He has 3 + 2 = 5.\n#### 1,234", "So it is $12, then $20.\n#### 1234"),
        ("14", "<think>13? \\boxed{13}</think>The answer is 14"),
        ("42", "<answer>42</answer>"),
        (42, "42.0"),
        ("y = 3", "So $x$ is 5. $y=3$"),
        ("x\\text{ inches}", "$x$"),
        ("10", "\\boxed{10 kg\\,m/s^2}"),
        ("3", "\\boxed{∛27}"),
        ("2/3", "\\boxed{2\N{FRACTION SLASH}3}"),
        ("12000", "\\boxed{12\N{NO-BREAK SPACE}000}"),
    ],
)
def test_equal_answers_are_equal_in_any_notation(gold, prediction):
    assert math_answer(inputs(prediction, answer=gold)) == [Score(1.0, {"correct": 1.0})]


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("42", ""),
        ("42", "12 42 7"),
        ("25", "2,5"),
        ("east", "seat"),  # the same letters: equal as a product
        ("east", "She starts east. The answer is north."),
        ("A", "B"),
        ("4:30 p.m.", "4:30 a.m."),
        ("1 - \\frac{1}{\\mathrm{e}}", "1 + \\frac{1}{\\mathrm{e}}"),
        ("Eq(x**2/4 + y**2/3, 1)", "\\boxed{Eq(x**2/16 + y**2/12, 1)}"),
        ("\\sin 30^\\circ", "\\sin 30"),
        ("(1,2)", "$1 \\le x \\le 2$"),
        ("[1, 2]", "(1, 2)"),
        ("n^2", "n^3"),
        ("13", "<think>\\boxed{13}</think>The answer is 14"),
        ("7", "So it is 7, no:\n#### 8"),
        ("10 kg m/s", "\\boxed{10 kg m/s^2}"),
        ("3", "\\boxed{∜27}"),
    ],
)
def test_different_answers_stay_different(gold, prediction):
    assert math_answer(inputs(prediction, answer=gold), correct=1.0, wrong=-1.0) == [
        Score(-1.0, {"correct": 0.0})
    ]


def test_the_way_without_a_parser_gives_math_verifys_verdict():
    draw = random.Random(0)
    compared = 0
    for _ in range(150):
        gold = str(draw.randint(-(10 ** draw.choice([1, 2, 9])), 10 ** draw.choice([1, 2, 9]))) + draw.choice(
            ["", ".0", ".5", ".123456"]
        )
        near = draw.choice(
            [
                gold,
                gold + ("0" if "." in gold else ".0"),
                gold[:-1] + str(draw.randint(0, 9)),
                gold.lstrip("-"),
                "0" + gold,
            ]
        )
        prediction = draw.choice([near, f"\\boxed{{{near}}}", f"$\\boxed{{{near}}}$."])
        answer = grader.answer_text.final_answer(prediction)
        assert answer is not None
        quick = grader._compare_numbers(gold, answer)
        compared += quick is not None
        assert quick in (None, grader._compare(gold, answer).is_right), (gold, prediction)
    assert compared > 100


def test_plain_numbers_never_reach_the_parser(monkeypatch: pytest.MonkeyPatch):
    """A quarter of a millisecond each; the parser takes tens."""
    monkeypatch.setattr(grader, "_compare", lambda gold, answer: pytest.fail(f"parses {answer!r}"))
    completions = [str(number) for number in range(1000)]
    scores = math_answer(inputs(*completions, answer="7"))
    assert sum(score.value for score in scores) == 1.0


def test_it_works_in_a_thread_where_no_signal_does():
    scores: list[Score] = []
    thread = threading.Thread(
        target=lambda: scores.extend(math_answer(inputs("$\\frac{21}{3}$", "8", answer="7")))
    )
    thread.start()
    thread.join()
    assert [score.value for score in scores] == [1.0, 0.0]


def test_running_out_of_time_is_ungraded_and_not_wrong():
    # sympy expands (1 + x)^n for seconds before it can compare; a hundredth of one must do
    hard = "$\\prod_{k=1}^{400} (1 + \\sqrt{k} x^k)$"
    assert math_answer(inputs(hard, "7", answer="(x+1)^{300} - \\sin x"), seconds=0.01)[0] == Score(
        0.0, ungraded="timeout"
    )


def test_a_missing_answer_column_names_those_there():
    with pytest.raises(ValueError, match=r"no column 'answer'; its columns are: level, solution"):
        math_answer(inputs("7", solution="7", level=2))
    with pytest.raises(ValueError, match="must hold the reference answer as text or a number, got None"):
        math_answer(inputs("7", answer=None))


def test_the_gold_follows_the_last_hashes_and_only_there():
    assert judge("#### -7", "\\boxed{-7}") and not judge("7 #### 8", "7")


def examples(table, which):
    return [(name, gold, answer) for name, pairs in table.items() for gold, answer in pairs[which]]


def test_every_way_to_a_verdict_has_reviewed_examples():
    assert set(DECIDED) == set(grader.DECIDED_BY)
    assert set(RULES) == {name for name, _ in (*answer_notation.RULES, *grader._RULES_FOR_PAIRS)}
    assert all(different for _, different in (*DECIDED.values(), *RULES.values()))


@pytest.mark.parametrize(("name", "gold", "answer"), examples(DECIDED, 0) + examples(RULES, 0))
def test_reviewed_equal_answers_are_right_for_the_reason_named(name: str, gold: str, answer: str):
    verdict = compare(gold, answer)
    assert verdict.is_right and (verdict.decided_by == name or name in verdict.rules), verdict
    assert judge(gold, f"So $\\sin x = 3$, hence\n\\boxed{{{answer}}}")


@pytest.mark.parametrize(("name", "gold", "answer"), examples(DECIDED, 1) + examples(RULES, 1))
def test_reviewed_different_answers_stay_wrong(name: str, gold: str, answer: str):
    assert not compare(gold, answer).is_right


SYMBOLS = st.sampled_from(["p", "q", "x", "\\pi", "\\alpha", "\\infty", "\\sin x"])
FORMS = ["{0}+{1}", "{0}-{1}", "\\frac{{{0}}}{{{1}}}", "({0},{1}]", "({0},{1})", "{0}>{1}"]
CHANGED_FORMS = ["{0}*{1}", "{1}-{0}", "\\frac{{{1}}}{{{0}}}", "[{0},{1}]", "({0},-{1})", "{0}<{1}"]


@settings(deadline=None, max_examples=60)
@given(
    SYMBOLS,
    SYMBOLS,
    st.sampled_from(["{0}+{1}", "{0}-{1}", "\\frac{{{0}}}{{{1}}}", "({0},{1}]", "({0},{1})", "{0}>{1}"]),
    st.data(),
)
def test_formulas_without_digits_are_not_words(first: str, second: str, form: str, data: st.DataObject):
    # the same letters with another operator, order, bracket or sign: math-verify alone decides, and words do
    # not
    changed = data.draw(
        st.sampled_from(["{0}*{1}", "{1}-{0}", "\\frac{{{1}}}{{{0}}}", "[{0},{1}]", "({0},-{1})", "{0}<{1}"])
    )
    verdict = compare(form.format(first, second), changed.format(first, second))
    assert verdict.decided_by in ("algebra", "same text")


UNMARKED = ["$x=4$", "4", "5", "\n", ". ", " and ", "Wait, ", "so it is", "$5$"]
MARKED = ["\\boxed{4}", "\\boxed{5}", "the answer is 5", "Answer: $4$.", "final answer is **5**", "####"]
COMPLETIONS = st.one_of(
    *(st.lists(st.sampled_from(pieces), max_size=7) for pieces in (UNMARKED, UNMARKED + MARKED))
)


@settings(deadline=None, max_examples=150)
@example("First 5.\nThen\nit is 4", "4")
@example("\\boxed{4} Wait, \\boxed{5}", "5")
@given(COMPLETIONS.map(" ".join), st.sampled_from(["4", "5", "4, 5"]))
def test_the_logged_answer_is_what_the_verdict_was_computed_from(completion: str, gold: str):
    (score,) = math_answer(inputs(completion, answer=gold))
    if score.answer is None:
        assert score.value == 0.0
    else:
        assert score.value == compare(gold, score.answer).is_right
        assert math_answer(inputs(f"\\boxed{{{score.answer}}}", answer=gold))[0].value == score.value


@pytest.mark.parametrize("gold", ["120^\\circ", "45^\\circ", "90^{\\circ}"])
def test_trigonometry_in_the_reasoning_leaves_an_angle_in_degrees(gold: str):
    reasoning = "Since $\\cos x = -1/2$ and $\\tan 45^\\circ = 1$, "
    for answer in (f"$\\boxed{{{gold}}}$", f"the answer is ${gold}$.", f"we get ${gold}$"):
        assert judge(gold, reasoning + answer)
        assert not judge("30^\\circ", reasoning + answer)


def test_degrees_and_radians_are_told_apart_only_inside_a_function():
    assert judge("\\sin 60^\\circ", "\\frac{\\sqrt{3}}{2}") and not judge("60^\\circ", "\\sin 60^\\circ")
    assert judge("\\cos 60^\\circ + 60^\\circ", "60^\\circ + \\frac{1}{2}")


def test_an_answer_beyond_any_reference_is_wrong_without_a_parser():
    commands = ("\\boxed{", "\\sin 3^\\circ ", "\\text{", "\\\\", "</think>", "the answer is ")
    for piece in ("9", "[", "$", "x^", "{", "12:30", *commands):
        for text in (piece * 12_000, f"\\boxed{{{piece * 2_000}}}"):
            started = time.process_time()
            (score,) = math_answer(inputs(text, answer="x+1"), wrong=-1.0)
            assert score.value == -1.0 and score.ungraded is None, (piece, score)
            assert time.process_time() - started < 2, piece  # of the processor; a parser takes minutes


def test_only_a_degenerate_answer_that_runs_out_of_time_may_be_called_wrong():
    tower = "2^{3^{4^{5^{6}}}}+x"
    hard = "\\prod_{k=1}^{400} (1 + \\sqrt{k} x^k)"
    gold = "(x+1)^{300} - \\sin x"
    assert is_degenerate("x+1", tower) and not is_degenerate(gold, hard) and not is_degenerate(tower, tower)
    assert is_degenerate("7", "1" * 40) and not is_degenerate("1" * 40, "2" * 40)
    kept = math_answer(inputs(f"${hard}$", answer=gold), seconds=0.01, timeout="wrong", wrong=-1.0)
    assert kept == [Score(0.0, ungraded="timeout")]
    # a power of thousands, as the reference has none, is degenerate
    slow = "\\prod_{k=1}^{4000} (1 + \\sqrt{k} x^k)"
    for timeout, expected in (
        ("ungraded", Score(0.0, ungraded="timeout")),
        ("wrong", Score(-1.0, {"correct": 0.0})),
    ):
        assert math_answer(inputs(f"${slow}$", answer=gold), seconds=0.01, timeout=timeout, wrong=-1.0) == [
            expected
        ]
