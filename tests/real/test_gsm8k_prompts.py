from fractions import Fraction
from pathlib import Path

import pytest

from rltrain.data.gsm8k import annotations_of, calculator_steps
from rltrain.data.rows import read_rows

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
pytestmark = pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not at ../shared/data/gsm8k")


def expressions(split: str) -> dict[str, str]:
    steps, _ = calculator_steps(read_rows(str(GSM8K / f"{split}.jsonl"), split=split))
    return {step.columns["prompt"]: step.columns["answer"] for step in steps}


# (rows, annotations, distinct annotations, distinct expressions, malformed): 11,021 and 2,894 count
# "100/2=50" and "100/2=50.00" apart.
@pytest.mark.parametrize(
    ("split", "counts"), [("train", (7473, 23716, 11021, 10772, 0)), ("test", (1319, 4282, 2894, 2845, 1))]
)
def test_the_files_hold_the_known_numbers_of_expressions(split: str, counts: tuple[int, ...]):
    rows = read_rows(str(GSM8K / f"{split}.jsonl"), split=split)
    annotations = [annotation for row in rows for annotation in annotations_of(row.columns["answer"])]
    steps, left_out = calculator_steps(rows)
    assert (len(rows), len(annotations), len(set(annotations)), len(steps), left_out["malformed"]) == counts
    assert len(steps) + left_out["repeated"] + left_out["malformed"] == len(annotations)
    assert len({step.id for step in steps}) == len(steps)


def test_every_answer_is_what_its_expression_is_worth():
    # An independent oracle: Python's own arithmetic, the answers being exact or rounded to six digits.
    for prompt, answer in (expressions("train") | expressions("test")).items():
        assert abs(eval(prompt.removesuffix("=")) - Fraction(answer)) < 1e-6, (prompt, answer)


def test_some_test_expressions_are_in_the_train_file():
    train = expressions("train")
    test = expressions("test")
    assert len(train.keys() & test.keys()) == 1470  # so 2,845 - 1,470 = 1,375 are held out
