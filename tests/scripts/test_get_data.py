"""scripts/get_data.py on small stand-ins: folders laid out as the Hub and as GitHub serve them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from support.scripts import script

CARD = (
    "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
    "  - split: test\n    path: main/test-*\n---\n"
)
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def get_data() -> ModuleType:
    return script("get_data")


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_lines = path.suffix == ".jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in content) if is_lines else json.dumps(content))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(get_data: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, **entries: Any) -> None:
    write(
        path,
        {name.replace("__", "/") + ".jsonl": {"digests": [], **entry} for name, entry in entries.items()},
    )
    monkeypatch.setattr(get_data, "MANIFEST", path)


def github(folder: Path) -> str:
    return folder.as_uri()


def test_gsm8k_comes_from_parquet_files_of_the_hub(
    get_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = tmp_path / "hub"
    for split in ("train", "test"):
        file = hub / f"openai/gsm8k/main/{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"{split}\u2019s?", "answer": "#### 1"}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (hub / "openai/gsm8k/README.md").write_text(CARD)
    get_data.main(["gsm8k", "--out", str(tmp_path / "out")], get_data.Sources(hub=hub))
    assert read(tmp_path / "out/gsm8k/train.jsonl") == [{"question": "train\u2019s?", "answer": "#### 1"}]
    assert read(tmp_path / "out/gsm8k/test.jsonl")[0]["question"] == "test\u2019s?"
    assert "1 rows, NOT those measured in docs/studies" in capsys.readouterr().out


def test_a_selection_has_the_listed_rows_in_the_listed_order(
    get_data: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = tmp_path / "hub"
    pairs = [{"chosen": f"a{number}", "rejected": "b"} for number in range(4)]
    file = hub / "Anthropic/hh-rlhf/helpful-base/test.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress("".join(f"{json.dumps(pair)}\n" for pair in pairs).encode()))
    rows = [{**pairs[number], "subset": "helpful-base/test"} for number in (2, 0, 3)]
    entry = {"revision": "main", "subsets": ["helpful-base"], "digests": [get_data.digest(rows)]}
    entry["rows"] = [" ".join(map(get_data.row_id, rows[:2])), get_data.row_id(rows[2])]
    lost = {**entry, "rows": [*entry["rows"], "00000000"], "digests": []}
    manifest(
        get_data,
        monkeypatch,
        tmp_path / "manifest.json",
        preference__hh_helpful_train=entry,
        preference__hh_helpful_test=lost,
    )
    with pytest.raises(
        SystemExit, match=r"hh_helpful_test.jsonl: the source has 3 of the 4 rows .* --from FOLDER"
    ):
        get_data.main(["hh_helpful", "--out", str(tmp_path / "out")], get_data.Sources(hub=hub))
    assert read(tmp_path / "out/preference/hh_helpful_train.jsonl") == rows
    assert "3 rows, those measured in docs/studies" in capsys.readouterr().out
    monkeypatch.setattr(get_data, "ABSENT", 0.25)
    get_data.main(["hh_helpful", "--out", str(tmp_path / "out")], get_data.Sources(hub=hub))
    assert read(tmp_path / "out/preference/hh_helpful_test.jsonl") == rows
    assert "1 of 4 rows are not in the source and are left out" in capsys.readouterr().out


def test_rollouts_are_a_row_each_and_pairs_of_right_and_wrong(
    get_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [
        {"prompt": "p", "completions": ["a", "b", "c"], "correctness": [True, False, True], "dataset": "d"},
        {"prompt": "q", "completions": ["e", "f"], "correctness": [False, False], "dataset": "d"},
    ]
    file = tmp_path / "hub/Windy0822/ultrainteract_math_rollout/train.parquet"
    file.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(problems), file)
    arguments = ["ultrainteract", "--out", str(tmp_path / "out")]
    get_data.main(arguments, get_data.Sources(hub=tmp_path / "hub"))
    rollouts = read(tmp_path / "out/ultrainteract_rollouts.jsonl")
    assert [(row["prompt"], row["completion"], row["label"]) for row in rollouts] == [
        ("p", "a", True),
        ("p", "b", False),
        ("p", "c", True),
        ("q", "e", False),
        ("q", "f", False),
    ]
    assert read(tmp_path / "out/ultrainteract_right_wrong.jsonl") == [
        {"prompt": "p", "chosen": chosen, "rejected": "b"} for chosen in ("a", "c")
    ]
    assert "5 rows\n" in capsys.readouterr().out
    assert "ultrainteract" not in get_data.STUDIED


def test_solutions_are_a_row_each_with_the_problems_number(get_data: ModuleType, tmp_path: Path) -> None:
    names = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    solutions = {name: {"solution": f"{name}\nA: 3", "is_correct": name == "6b_finetuning"} for name in names}
    problem = {"question": "q", "ground_truth": "so\nA: 3", **solutions}
    write(tmp_path / f"r/{COMMIT}/s.jsonl", [problem, problem])
    sources = get_data.Sources(github=github(tmp_path))
    rows = list(
        get_data.gsm8k_solutions(sources, {"repository": "r", "commit": COMMIT, "files": ["s.jsonl"]})
    )
    assert [row["problem_idx"] for row in rows] == [0] * 4 + [1] * 4
    assert rows[3] == {
        "problem_idx": 0,
        "gold": "3",
        "generator": "gpt3-175b_verification",
        "solution": "175b_verification\nA: 3",
        "is_correct": False,
    }


def test_votes_decide_which_answer_is_chosen_and_ties_are_left_out(
    get_data: ModuleType, tmp_path: Path
) -> None:
    base = {"cmp_key": "m_n", "instruction": "Do it.", "input": "", "response1": "one ", "response2": "two"}
    votes = [(2, 2, 0), (1, 2, 0), (1, 1, 1)]  # 2.5 to 0.5 for the second, a tie, 3 to 0 for the first
    pairs = [
        {**base, **{f"annotator{number}": vote for number, vote in enumerate(three, 1)}} for three in votes
    ]
    pairs[2]["input"] = " with this"
    write(tmp_path / f"r/{COMMIT}/v.json", pairs)
    entry = {"repository": "r", "commit": COMMIT, "files": ["v.json"]}
    rows = list(get_data.graded_human_votes(get_data.Sources(github=github(tmp_path)), entry))
    assert [row["split"] for row in rows] == ["train", "test"] * 2
    keys = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_model")
    assert [tuple(row[key] for key in keys) for row in rows[::2]] == [
        ("Do it.", "two", "one", 2.5, 0.5, "n"),
        ("Do it.\n\nwith this", "one", "two", 3.0, 0.0, "m"),
    ]


def test_gpt4s_scores_are_averaged_over_both_orders_by_the_answers_ids(
    get_data: ModuleType, tmp_path: Path
) -> None:
    root = tmp_path / f"q/{COMMIT}"
    ratings = "eval/ratings-gpt4/vicuna/relative-gpt-3.5"
    write(root / "questions.jsonl", [{"question_id": 1, "text": "why?"}])
    write(
        root / "eval/generations/vicuna/base.jsonl",
        [{"question_id": 1, "answer_id": "B", "text": "because", "model_id": "g"}],
    )
    generation = "no. A chat between a curious human and an artificial intelligence assistant"
    write(
        root / "eval/generations/vicuna/m.jsonl",
        [{"question_id": 1, "text": "why?", "generation_truncated": generation}],
    )
    # both files have GPT-3.5's answer first, whatever their names say
    review = {"question_id": 1, "answer1_id": "B", "answer2_id": "x"}
    write(root / f"{ratings}/m-vs-gpt-3.5-gpt4-reviewer.jsonl", [{**review, "score": [9, 4]}])
    write(root / f"{ratings}/gpt-3.5-vs-m-gpt4-reviewer.jsonl", [{**review, "score": [8, 4]}])
    qlora = {"repository": "q", "commit": COMMIT, "questions": "questions.jsonl"}
    qlora["models"] = {"m": "m", "gpt-3.5": "base"}  # type: ignore[assignment]
    root = tmp_path / f"f/{COMMIT}"
    write(root / "q.jsonl", [{"question_id": 7, "text": "who?"}])
    answers = [{"answer_id": name, "text": f"{name}\n", "model_id": f"model {name}"} for name in "ab"]
    write(root / "a.jsonl", answers)
    reviews = [
        {"question_id": 7, "answer1_id": first, "answer2_id": second, "score": score}
        for first, second, score in (("a", "b", [3, 5]), ("a", "b", [4, 4]), ("a", "unknown", [1, 2]))
    ]
    write(root / "r.jsonl", reviews)
    fastchat = {"repository": "f", "commit": COMMIT, "questions": "q.jsonl"}
    fastchat |= {"answers": ["a.jsonl"], "reviews": ["r.jsonl"]}  # type: ignore[dict-item]
    sources = get_data.Sources(github=github(tmp_path))
    rows = list(get_data.graded_gpt4_scores(sources, {"fastchat": fastchat, "qlora": qlora}))
    keys = (
        "prompt",
        "chosen",
        "rejected",
        "score_chosen",
        "score_rejected",
        "rejected_model",
        "n_judgements",
    )
    assert [tuple(row[key] for key in keys) for row in rows[::2]] == [
        ("who?", "b", "a", 5, 3, "model a", 1),
        ("why?", "because", "no.", 8.5, 4.0, "m", 2),
    ]


def test_steps_after_the_first_error_have_no_label(get_data: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / f"r/{COMMIT}"
    solution = {
        "uuid": "u",
        "question": " q ",
        "ground_truth_answer": 5,
        "model_output_steps": ["Step 1: a", "Step 2: b", "Step 3: c"],
        "model_output_answer_correctness": "wrong",
        "model_output_solution_first_error_step": 2,
        "model_output_solution_first_error_reason": "x" * 300,
        "question_type": "original",
    }
    right = {**solution, "uuid": "v", "model_output_solution_first_error_step": "0"}
    write(root / "gsm.json", [solution, right, solution])
    choice = {
        "Question_UUID": "w",
        "Subject": "college_math",
        "Question": "pick",
        "Options": "A: 1 \nB: 2 ",
        "Ground_Truth_Answer_Modified": "B",
        "Sampled_Model": "m",
        "Model_Solution_Steps": ["Step 1: two", "Solution: Choice_B"],
        "Model_Solution_Correctness": "correct",
        "Model_Solution_First_Error_Step": "N/A",
        "Model_Solution_Error_Reason": "N/A",
    }
    unclear = {**choice, "Model_Solution_Correctness": "incorrect"}
    write(root / "ben.json", {"w": [choice, unclear]})
    entry = {
        name: {"repository": "r", "commit": COMMIT, "files": [file]}
        for name, file in (("mr_gsm8k", "gsm.json"), ("mr_ben", "ben.json"))
    }
    first, second = get_data.step_labelled(get_data.Sources(github=github(tmp_path)), entry)
    assert (first["steps"], first["labels"], first["first_error_step"]) == (["a", "b", "c"], [1, 0, None], 1)
    assert (first["problem"], first["gold"], len(first["error_reason"])) == ("q", "5", 240)
    assert (second["labels"], second["first_error_step"]) == ([1, 1], -1)
    assert (second["problem"], second["answer_correct"]) == ("pick\nOptions: A: 1 \nB: 2", True)


def test_files_of_a_folder_are_checked_and_copied(get_data: ModuleType, tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "#### 2", "more": 1}]
    write(tmp_path / "mine/gsm8k/train.jsonl", rows)
    write(tmp_path / "mine/test.jsonl", rows)  # with or without the inner folder
    arguments = ["gsm8k", "--from", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]
    get_data.main(arguments)
    assert read(tmp_path / "out/gsm8k/train.jsonl") == read(tmp_path / "out/gsm8k/test.jsonl") == rows
    get_data.main(arguments)  # the same rows again are no conflict
    write(tmp_path / "mine/test.jsonl", rows * 2)
    with pytest.raises(SystemExit, match=r"test.jsonl: exists with other rows; .*--overwrite"):
        get_data.main(arguments)
    get_data.main([*arguments, "--overwrite"])
    assert len(read(tmp_path / "out/gsm8k/test.jsonl")) == 2
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, r"no gsm8k/train.jsonl; expected .*Put the file there"),
        ("", r"no rows; expected a JSON object a line with the columns question, answer"),
        ('{"question": "q"}\n', r"row 1: got the columns question; expected 'answer' as str"),
        ('{"question": "q", "answer": 3}\n', r"row 1: got int; expected 'answer' as str"),
        ("[1]\n", r"row 1: not a JSON object"),
        ("{\n", r"expected a JSON object a line, in UTF-8"),
    ],
)
def test_a_file_with_other_content_is_refused(
    get_data: ModuleType, tmp_path: Path, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=expected):
        get_data.main(["gsm8k", "--from", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_away_or_changed_is_one_line_with_a_remedy(
    get_data: ModuleType, tmp_path: Path
) -> None:
    sources = get_data.Sources(github=github(tmp_path), hub=tmp_path)
    arguments = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^error: file://.*\.jsonl: URLError.*--from FOLDER$"):
        get_data.main(["gsm8k_solutions", *arguments], sources)
    with pytest.raises(SystemExit, match=r"^error: Hub data set openai/gsm8k .*--from FOLDER"):
        get_data.main(["gsm8k", *arguments], sources)
    entry = json.loads(get_data.MANIFEST.read_text())["gsm8k/model_solutions.jsonl"]
    write(tmp_path / entry["repository"] / entry["commit"] / entry["files"][0], [{"question": "q"}])
    with pytest.raises(SystemExit, match=r"KeyError: 'ground_truth'; the source is not laid out as expected"):
        get_data.main(["gsm8k_solutions", *arguments], sources)
    with pytest.raises(SystemExit, match="no such folder; expected one that holds the data files"):
        get_data.main(["gsm8k", "--from", str(tmp_path / "absent")])


def test_every_file_has_its_manifest_entry(get_data: ModuleType) -> None:
    entries = json.loads(get_data.MANIFEST.read_text())
    assert {file.path for files in get_data.DATA_SETS.values() for file in files} == set(entries)
    for entry in entries.values():
        ids = " ".join(entry.get("rows", [])).split()
        assert len(ids) == len(set(ids)) and all(len(name) == 8 for name in ids)
