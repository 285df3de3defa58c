import re
import subprocess
import sys

import pytest

from rltrain.data.tasks import arithmetic, task_rows


def operands(row: dict[str, str]) -> tuple[int, int]:
    left, right = re.fullmatch(r"(\d+)[-+*](\d+)=", row["prompt"]).groups()
    return int(left), int(right)


def test_two_digit_additions_are_all_there_once_and_right():
    rows = arithmetic("train") + arithmetic("test")
    assert len({row["prompt"] for row in rows}) == len(rows) == 90 * 90  # operands 10..99
    for row in rows:
        assert int(row["answer"]) == sum(operands(row))
        assert row["prompt"] == row["equation"]
        assert all(10 <= operand <= 99 for operand in operands(row))


def test_a_question_in_words_asks_the_same_problems():
    rows = arithmetic("test", {"question": "What is {left} {operation} {right}?"})
    assert [row["equation"] for row in rows] == [row["prompt"] for row in arithmetic("test")]
    assert rows[0]["prompt"] == "What is {} + {}?".format(*operands({"prompt": rows[0]["equation"]}))
    with pytest.raises(ValueError, match=r"data.options.question is .*read alike; write \{left\}"):
        arithmetic("test", {"question": "What is {left} + 1?"})
    with pytest.raises(ValueError, match=r"data.options.question is .*KeyError\('answer'\); write \{left\}"):
        arithmetic("test", {"question": "{left}{operation}{right}={answer}"})


def test_an_answer_ends_a_program_that_prints_it(capfd):
    row = task_rows("arithmetic", "train")[0]
    subprocess.run([sys.executable, "-c", row["before"] + row["answer"]], check=True)
    assert [{"input": "", "output": capfd.readouterr().out.strip()}] == row["tests"]


def test_no_pair_of_operands_is_in_both_splits_in_either_order():
    train, test = (
        {tuple(sorted(operands(row))) for row in arithmetic(split, {"operations": "+-*"})}
        for split in ("train", "test")
    )
    assert not train & test
    # held_out 0.1 of 4,095 pairs: standard deviation 0.005
    assert 0.08 < len(test) / (len(train) + len(test)) < 0.12


def test_other_operations_and_digits():
    rows = arithmetic("train", {"operations": "-*", "digits": 1, "held_out": 0.5})
    for row in rows:
        left, right = operands(row)
        assert int(row["answer"]) == (left - right if "-" in row["prompt"] else left * right)
        assert 0 <= left <= 9
    assert {row["prompt"][1] for row in rows} == {"-", "*"}


def test_rows_are_shuffled_and_the_same_each_time_and_count_cuts_them():
    assert arithmetic("train") == arithmetic("train")
    assert len(arithmetic("train", {"count": 50})) == 50
    firsts = [operands(row)[0] for row in arithmetic("train")[:20]]
    assert firsts != sorted(firsts)


def test_nine_digits_do_not_enumerate_the_space():
    rows = arithmetic("test", {"digits": 9, "count": 300, "held_out": 0.01})
    assert len({row["prompt"] for row in rows}) == 300


def test_split_seed_moves_the_split():
    first, other = ({row["prompt"] for row in arithmetic("test", {"split_seed": seed})} for seed in (0, 1))
    assert len(first & other) < len(first) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digit": 2}, "no option 'digit'; did you mean 'digits'"),
        ({"digits": 0}, r"data.options.digits is 0"),
        ({"operations": "/"}, r"data.options.operations is '/'"),
        ({"operations": "++"}, "name each operation once"),
        ({"held_out": 1.0}, r"data.options.held_out"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        arithmetic("train", options)
