import pytest

from rltrain.data.gsm8k import annotations_of, calculator_steps
from rltrain.data.rows import Row


def rows(*answers: object) -> list[Row]:
    return [
        Row(f"train.jsonl:{number}", f"train.jsonl, line {number + 1}", {"question": "?", "answer": a})
        for number, a in enumerate(answers)
    ]


def test_an_annotation_becomes_a_prompt_and_its_answer():
    steps, left_out = calculator_steps(
        rows("Natalia sold 48/2 = <<48/2=24>>24 clips in May, <<48+24=72>>72 in all.\n#### 72")
    )
    assert [step.columns for step in steps] == [
        {"prompt": "48/2=", "answer": "24"},
        {"prompt": "48+24=", "answer": "72"},
    ]
    assert [step.id for step in steps] == ["train.jsonl:0.0", "train.jsonl:0.1"]
    assert left_out == {"repeated": 0, "malformed": 0}


def test_an_expression_is_asked_once_with_its_shortest_answer():
    steps, left_out = calculator_steps(
        rows("<<100/2=50.00>>50", "<<3*4=12>>12 <<100/2=50>>50", "<<100/2=50.00>>50")
    )
    assert [(step.columns["prompt"], step.columns["answer"]) for step in steps] == [
        ("100/2=", "50"),
        ("3*4=", "12"),
    ]
    assert left_out["repeated"] == 2


@pytest.mark.parametrize("annotation", ["48/2", "3/4=3/4", "2=1+1=2", "x+1=3", "=5", "5+5=", "1+1=2%"])
def test_malformed_annotations_are_counted_not_asked(annotation: str):
    steps, left_out = calculator_steps(rows(f"<<{annotation}>> <<1+1=2>>"))
    assert [step.columns["prompt"] for step in steps] == ["1+1="]
    assert left_out["malformed"] == 1


@pytest.mark.parametrize("answer", ["-5", "0.2", ".50", "7."])
def test_answers_stay_as_they_stand(answer: str):
    assert calculator_steps(rows(f"<<1+1={answer}>>"))[0][0].columns["answer"] == answer


def test_a_row_without_a_text_answer_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: .*text column 'answer'"):
        calculator_steps(rows("<<1+1=2>>", 7))


def test_text_without_annotations_has_none():
    assert annotations_of("1 << 2 and 3 >> 1") == [" 2 and 3 "]  # taken for one, and malformed
    assert annotations_of("#### 72") == []
