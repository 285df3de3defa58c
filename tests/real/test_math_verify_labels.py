"""``math_answer`` against labelled answers in ../shared/data/verify and real references (math-verify alone:
762 of 793)."""

import json
import random
from pathlib import Path

import pytest
from math_verify import parse, verify

from rltrain.reward import answer_text
from rltrain.reward.math_answer import Verdict, compare, math_answer
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.time_limit import TimeUp, cpu_time_limit
from support.reviewed_verdicts import DECIDED, RULES

DATA = Path(__file__).parents[3] / "shared" / "data"
VERIFY = DATA / "verify"
pytestmark = pytest.mark.skipif(not VERIFY.exists(), reason=f"{VERIFY} is absent")

# Verdicts on which people disagree, row by row as this project decides them: no rounding below math-verify's
# six decimals, lists in any order, percent as a number, units and restatements by value.
CONTESTED = "0001101100110100111001110101110000"


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def graded(gold: str, completion: str) -> Score:
    [score] = math_answer(RewardInputs("", (completion,), (1,), ("stop",), {"answer": gold}), seconds=2.0)
    return score


def false_verdicts(rows: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """Id and label of rows whose verdict is not the label; an ungraded answer is no right one."""
    return [
        (row["id"], row["correct"])
        for row in rows
        if (graded(row["gold"], row["prediction"]).value == 1.0) != row["correct"]
    ]


@pytest.mark.slow
def test_every_label_of_the_development_set_is_met():
    assert false_verdicts(read(VERIFY / "dev.jsonl")) == []


def test_97_percent_of_the_labelled_notations_are_met_and_no_wrong_answer_is_right():
    rows = read(VERIFY / "notations.jsonl")
    false = false_verdicts(rows)
    assert len(false) <= 0.03 * len(rows), false
    assert [row for row, label in false if not label] == []


def test_contested_verdicts_stay_as_they_were_decided():
    verdicts = [graded(row["gold"], row["prediction"]).value for row in read(VERIFY / "contested.jsonl")]
    assert "".join(str(int(value)) for value in verdicts) == CONTESTED


def test_gsm8ks_labels_are_met():
    rows = read(DATA / "gsm8k" / "model_solutions.jsonl")
    met = sum((graded(row["gold"], row["solution"]).value == 1.0) == row["is_correct"] for row in rows)
    assert met == len(rows) == 5276


REFERENCES = ("math500", "math_train_sample2000", "olympiadbench", "minerva", "amc23", "aime24", "aime25")


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_is_its_own_answer_whatever_the_reasoning_speaks_of(name: str):
    wrong = []
    for row in read(DATA / "math" / f"{name}.jsonl"):
        gold = str(row["answer"])
        answer = gold.strip().rstrip(".").strip("$")
        completion = (
            "Since $\\cos x = -1/2$ and $\\tan 45^\\circ = 1$, not \\boxed{0}. "
            f"Wait, \\[\\boxed{{{answer}}}.\\]"
        )
        wrong += [gold] if graded(gold, completion).value != 1.0 else []
    assert wrong == []


def pairs_of_different_rows(count: int) -> list[tuple[str, str]]:
    """References and completions of different rows, half of them neighbours in alphabetical order and
    therefore of one form."""
    rows = [row for name in ("dev", "notations") for row in read(VERIFY / f"{name}.jsonl")]
    golds = [row["gold"] for row in rows]
    completions = [row["prediction"] for row in rows if len(row["prediction"]) < 200]
    for name in REFERENCES[:4]:
        answers = [str(row["answer"]) for row in read(DATA / "math" / f"{name}.jsonl")][:200]
        golds += answers
        completions += [f"\\boxed{{{answer}}}" for answer in answers]
    draw = random.Random(0)
    golds = sorted(golds)
    completions = sorted(completions, key=lambda text: text.removeprefix("\\boxed{"))
    start = draw.randrange(50)
    near = [
        (golds[place * len(golds) // len(completions)], completions[place])
        for place in range(start, len(completions))
    ]
    return near[: count // 2] + [(draw.choice(golds), draw.choice(completions)) for _ in range(count // 2)]


def math_verify_alone(gold: str, completion: str) -> bool:
    """Bare mathematics between dollars, as math-verify asks for it, and nothing else."""
    texts = [
        text if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")) else f"${text}$"
        for text in (gold, completion)
    ]
    try:
        with cpu_time_limit(2.0):
            return verify(
                parse(texts[0], parsing_timeout=0), parse(texts[1], parsing_timeout=0), timeout_seconds=0
            )
    except TimeUp:
        return False


def math_verify_reads_it(gold: str, completion: str, answer: str) -> bool:
    """Whether math-verify alone calls the answer right wherever it is shown it: where it stands has tests of
    its own."""
    return any(math_verify_alone(gold, text) for text in (f"\\boxed{{{answer}}}", answer, completion))


@pytest.mark.slow
def test_where_math_verify_alone_says_wrong_a_right_answer_is_of_a_reviewed_kind():
    labelled = [
        (row["gold"], row["prediction"])
        for name in ("dev", "notations")
        for row in read(VERIFY / f"{name}.jsonl")
    ]
    mended: list[Verdict] = []
    for gold, completion in labelled + pairs_of_different_rows(1000):
        score = graded(gold, completion)
        expected = answer_text.gold_part(gold)
        if (
            score.value == 1.0
            and score.answer
            and not math_verify_reads_it(expected, completion, score.answer)
        ):
            mended.append(compare(expected, score.answer))
            assert is_reviewed(mended[-1]), (gold, completion, score.answer, mended[-1])
    assert len(mended) >= 20  # the rules have something to do


def is_reviewed(verdict: Verdict) -> bool:
    return verdict.rules <= set(RULES) and (
        verdict.decided_by in DECIDED if verdict.decided_by != "algebra" else bool(verdict.rules)
    )
