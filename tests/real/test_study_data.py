"""What the studies' scripts make of the real data: nothing that is held out is trained on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import SCRIPTS, script

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")


@pytest.fixture(scope="module")
def scripts(tiny_models: ModuleType) -> Iterator[dict[str, ModuleType]]:
    """make_text_model and make_outcome_task, which take parts from one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        patch.delitem(sys.modules, "make_text_model", raising=False)
        yield {name: script(name) for name in ("make_text_model", "make_outcome_task")}
        sys.modules.pop("make_text_model", None)


def test_no_problem_with_labelled_steps_is_trained_on(scripts: dict[str, ModuleType]) -> None:
    task = scripts["make_outcome_task"]
    questions = [row["question"] for row in task.read(DATA / "gsm8k" / "test.jsonl")]
    rows_with_steps = task.read(DATA / "process" / "step_labelled.jsonl")
    labelled = [row["problem"] for row in rows_with_steps]
    held_out = task.held_out_problems(questions, labelled, task.HELD_OUT)
    rows = task.outcome_rows(task.read(DATA / "gsm8k" / "model_solutions.jsonl"), questions)
    sides = task.divide_by_problem(rows, held_out)
    assert {name: len(part) for name, part in sides.items()} == {"train": 3324, "dev": 368, "test": 1584}
    # by another way than passages: no training question is a labelled problem word for word
    asked = {"".join(text.lower().split()) for text in labelled}
    assert not [
        row for row in sides["train"] + sides["dev"] if "".join(row["prompt"].lower().split()) in asked
    ]
    assert sum(row["label"] for part in sides.values() for row in part) == 2001
    # scripts/get_data.py makes the rows of these two sources only: the split is the same
    people = [row["problem"] for row in rows_with_steps if row["source"] in ("MR-GSM8K", "Mr-Ben")]
    assert task.held_out_problems(questions, people, task.HELD_OUT) == held_out


def test_no_held_out_dialogue_is_read(scripts: dict[str, ModuleType]) -> None:
    text_models = scripts["make_text_model"]
    files = (DATA / "preference" / f"hh_helpful_{part}.jsonl" for part in ("train", "test"))
    dialogues, reserved = map(text_models.dialogues, files)
    kept = text_models.without_beginnings(dialogues, reserved)
    assert len(dialogues) > 5900 and len(reserved) > 900
    assert not {dialogue[0] for dialogue in kept} & {dialogue[0] for dialogue in reserved}
    assert len(kept) == len(dialogues)  # the files were made without a first turn in common
