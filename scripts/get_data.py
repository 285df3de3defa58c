"""Gets the data files that recipes and studies read.

    python scripts/get_data.py gsm8k hh_helpful            # from the Hub, into data/
    python scripts/get_data.py all --from ~/my_data         # from a folder that already holds the files

Names: gsm8k, gsm8k_solutions, hh_helpful, graded_human_votes, graded_gpt4_scores, step_labelled, or all of
these; ultrainteract, for reward models at their papers' scale, is large and only made when named. Recipes
name the files as ``data/...``, so run them from the repository root.

GSM8K, HH-RLHF and UltraInteract come from the Hugging Face Hub, the others from their authors' GitHub
repositories at a fixed commit. ``scripts/get_data.json`` lists files and commits, and for data sets that are
a selection the rows, in order. Each file is compared with the one that the numbers in docs/studies were
measured on; where the rows differ, the script says so.

With ``--from`` nothing is downloaded: FOLDER/gsm8k/train.jsonl or FOLDER/train.jsonl is checked (JSON lines,
columns, types) and copied.

What has been run: the conversions except UltraInteract's, on copies of the GitHub repositories at these
commits and of HH-RLHF's files; they give the measured files row by row. What has not been run: a download
from huggingface.co or github.com.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import http.client
import json
import os
import re
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MANIFEST = Path(__file__).with_suffix(".json")
GITHUB = "https://raw.githubusercontent.com"
SECONDS = 60
CONNECTIONS = 8
ABSENT = 0.01  # share of a selection's rows that the source may lack before that is an error
Row = dict[str, Any]


class DataError(Exception):
    """What arrived, what was expected and the remedy, for the user."""


class Sources(NamedTuple):
    """Where raw files come from. Tests put folders in the place of both sites."""

    github: str = GITHUB
    hub: Path | None = None  # folder with a folder per data set; None: the Hub

    def text(self, repository: str, commit: str, path: str) -> str:
        url = f"{self.github}/{repository}/{commit}/{urllib.parse.quote(path)}"
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as response:
                return response.read().decode("utf-8")
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            raise DataError(
                f"{url}: {type(error).__name__}: {error}; expected a UTF-8 text file. Check the "
                "connection, or name a folder that holds the data with --from FOLDER"
            ) from error

    def texts(self, repository: str, commit: str, paths: Sequence[str]) -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda path: self.text(repository, commit, path), paths))

    def hub_rows(self, repository: str, **arguments: Any) -> list[Row]:
        """All rows of one split of a data set on the Hub."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        where = repository if self.hub is None else str(self.hub / repository)
        try:
            return [dict(row) for row in load_dataset(where, **arguments)]
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"Hub data set {repository} ({arguments}): {type(error).__name__}: {error}; expected "
                "datasets.load_dataset to load it. Check the connection and HF_HUB_OFFLINE, or name a folder "
                "that holds the data with --from FOLDER"
            ) from error


class DataFile(NamedTuple):
    """A file that recipes read."""

    path: str  # below the output folder
    columns: dict[str, tuple[type, ...]]  # the ones that rltrain reads; further ones may follow
    rows: Callable[
        [Sources, Row], Iterable[Row]
    ]  # from the raw files; the second argument: its manifest entry


# conversions ------------------------------------------------------------------------------------------------


def json_lines(text: str) -> list[Row]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def gsm8k(split: str) -> Callable[[Sources, Row], list[Row]]:
    def rows(sources: Sources, entry: Row) -> list[Row]:
        return sources.hub_rows("openai/gsm8k", name="main", split=split, revision=entry["revision"])

    return rows


def gsm8k_solutions(sources: Sources, entry: Row) -> Iterator[Row]:
    """GPT-3's four solutions of every test problem, a row each."""
    (text,) = sources.texts(entry["repository"], entry["commit"], entry["files"])
    for number, problem in enumerate(json_lines(text)):
        for generator in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            yield {
                "problem_idx": number,
                "gold": problem["ground_truth"].rpartition("A:")[2].strip(),
                "generator": f"gpt3-{generator}",
                "solution": problem[generator]["solution"],
                "is_correct": problem[generator]["is_correct"],
            }


def hh_helpful(sources: Sources, entry: Row) -> Iterator[Row]:
    """Pairs of HH-RLHF's helpful test splits; the manifest chooses among them."""
    for subset in entry["subsets"]:
        files = {"test": f"{subset}/test.jsonl.gz"}
        for row in sources.hub_rows(
            "Anthropic/hh-rlhf", data_files=files, split="test", revision=entry["revision"]
        ):
            yield {"chosen": row["chosen"], "rejected": row["rejected"], "subset": f"{subset}/test"}


def ultrainteract_rollouts(sources: Sources, entry: Row) -> Iterator[Row]:
    """Every answer of every problem, right or wrong by its outcome, as in ImplicitPRM's train_ce.py."""
    for problem in sources.hub_rows(entry["repository"], split="train", revision=entry["revision"]):
        for completion, is_right in zip(problem["completions"], problem["correctness"], strict=False):
            yield {"prompt": problem["prompt"], "completion": completion, "label": bool(is_right)}


def ultrainteract_right_wrong(sources: Sources, entry: Row) -> Iterator[Row]:
    """Each right answer of a problem with each wrong one, as in ImplicitPRM's train_dpo.py."""
    for problem in sources.hub_rows(entry["repository"], split="train", revision=entry["revision"]):
        answers = list(zip(problem["completions"], problem["correctness"], strict=False))
        for chosen in (text for text, is_right in answers if is_right):
            for rejected in (text for text, is_right in answers if not is_right):
                yield {"prompt": problem["prompt"], "chosen": chosen, "rejected": rejected}


def graded_pair(prompt: str, sides: Sequence[tuple[str, str, float]], **columns: Any) -> Iterator[Row]:
    """The pair of two answers (text, model, score), the better one chosen, as a row of either split.

    Nothing where the scores are equal.
    """
    chosen, rejected = sorted(sides, key=lambda side: -side[2])
    if chosen[2] > rejected[2]:
        row = {"prompt": prompt, "chosen": chosen[0].strip(), "rejected": rejected[0].strip()}
        row |= {"score_chosen": chosen[2], "score_rejected": rejected[2]}
        row |= {"score_scale": columns["scale"], "n_judgements": columns["judgements"]}
        row |= {"chosen_model": chosen[1], "rejected_model": rejected[1], "source": columns["source"]}
        for split in ("train", "test"):
            yield {**row, "split": split}


def graded_human_votes(sources: Sources, entry: Row) -> Iterator[Row]:
    """PandaLM's test set: the votes of three people, a tie counting half for each side."""
    (text,) = sources.texts(entry["repository"], entry["commit"], entry["files"])
    for pair in json.loads(text):
        votes = [pair[f"annotator{number}"] for number in (1, 2, 3)]
        first = sum({1: 1.0, 2: 0.0, 0: 0.5}[vote] for vote in votes)
        models = pair["cmp_key"].split("_")
        answers = (str(pair["response1"]), str(pair["response2"]))
        sides = [(answers[0], models[0], first), (answers[1], models[1], 3.0 - first)]
        prompt = pair["instruction"].strip()
        extra = pair["input"].strip()
        prompt = f"{prompt}\n\n{extra}" if extra else prompt
        scale = "0-3 human votes (tie vote = 0.5 each)"
        yield from graded_pair(prompt, sides, scale=scale, judgements=3, source="pandalm/testset-v1")


def graded_gpt4_scores(sources: Sources, entry: Row) -> Iterator[Row]:
    yield from _fastchat_reviews(sources, entry["fastchat"])
    yield from _qlora_ratings(sources, entry["qlora"])


def _fastchat_reviews(sources: Sources, entry: Row) -> Iterator[Row]:
    """GPT-4's scores of two answers in one order of presentation."""
    fetch = [entry["questions"], *entry["answers"], *entry["reviews"]]
    texts = dict(zip(fetch, sources.texts(entry["repository"], entry["commit"], fetch), strict=True))
    questions = {row["question_id"]: row["text"] for row in json_lines(texts[entry["questions"]])}
    answers = {row["answer_id"]: row for path in entry["answers"] for row in json_lines(texts[path])}
    for path in entry["reviews"]:
        for review in json_lines(texts[path]):
            pair = [answers.get(review[key]) for key in ("answer1_id", "answer2_id")]
            sides = [
                (answer["text"], answer["model_id"], score)
                for answer, score in zip(pair, review["score"], strict=True)
                if answer is not None
            ]
            if len(sides) == 2:
                yield from graded_pair(
                    questions[review["question_id"]].strip(),
                    sides,
                    scale="1-10 (GPT-4, single order)",
                    judgements=1,
                    source="fastchat/vicuna-review",
                )


def _qlora_ratings(sources: Sources, entry: Row) -> Iterator[Row]:
    """GPT-4's scores of a model's answer and GPT-3.5's, the mean over both orders of presentation.

    Which score is GPT-3.5's follows from its answer's id: most files name the sides in the wrong order.
    """
    base = "gpt-3.5"
    generations = {name: f"eval/generations/vicuna/{stem}.jsonl" for name, stem in entry["models"].items()}
    ratings = {
        name: [f"eval/ratings-gpt4/vicuna/relative-gpt-3.5/{order}gpt4-reviewer.jsonl" for order in orders]
        for name in generations
        if name != base
        for orders in [(f"{name}-vs-{base}-", f"{base}-vs-{name}-")]
    }
    fetch = [
        entry["questions"],
        *generations.values(),
        *(path for paths in ratings.values() for path in paths),
    ]
    texts = dict(zip(fetch, sources.texts(entry["repository"], entry["commit"], fetch), strict=True))
    questions = {row["question_id"]: row["text"] for row in json_lines(texts[entry["questions"]])}
    answers = {
        name: {row["question_id"]: row for row in json_lines(texts[path])}
        for name, path in generations.items()
    }
    for name, paths in ratings.items():
        reviews = [{row["question_id"]: row for row in json_lines(texts[path])} for path in paths]
        for number, question in questions.items():
            base_id = answers[base][number]["answer_id"]
            scores = [
                review["score"] if review["answer2_id"] == base_id else review["score"][::-1]
                for review in (rated[number] for rated in reviews)
            ]
            means = [(scores[0][side] + scores[1][side]) / 2 for side in (0, 1)]
            sides = [
                (_generation(answers[model][number]), model, mean)
                for model, mean in zip((name, base), means, strict=True)
            ]
            scale = "1-10 (GPT-4, mean over both presentation orders)"
            yield from graded_pair(
                question.strip(), sides, scale=scale, judgements=2, source="qlora/vicuna-relative"
            )


def _generation(answer: Row) -> str:
    """The answer that GPT-4 read: a generation ends where the model began the template's next dialogue."""
    if "generation_truncated" not in answer:
        return answer["text"]
    return answer["generation_truncated"].partition(
        "A chat between a curious human and an artificial intelligence"
    )[0]


def step_labelled(sources: Sources, entry: Row) -> Iterator[Row]:
    """Solutions whose first wrong step people marked.

    The file that docs/studies was measured on has further rows, of PRMBench, PRM800K and Math-Shepherd, that
    the study does not use: with and without them scripts/make_outcome_task.py makes the same files.
    """
    yield from _mr_gsm8k(sources, entry["mr_gsm8k"])
    yield from _mr_ben(sources, entry["mr_ben"])


def _labelled_steps(steps: Sequence[str], first_error: int) -> Row:
    """Steps without "Step 3:", with labels: 1 good, 0 wrong, null after the first error.

    first_error: counted from 0; -1: none.
    """
    good = len(steps) if first_error < 0 else first_error
    labels = [1] * good + [0, *[None] * (len(steps) - good - 1)][: len(steps) - good]
    bare_steps = [re.sub(r"^\s*Step\s*\d+\s*:\s*", "", step).strip() for step in steps]
    return {"steps": bare_steps, "labels": labels, "first_error_step": first_error}


def _mr_gsm8k(sources: Sources, entry: Row) -> Iterator[Row]:
    problems: dict[str, Row] = {}
    for text in sources.texts(entry["repository"], entry["commit"], entry["files"]):
        for solution in json.loads(text):
            problems.setdefault(solution["uuid"], solution)
    for name, solution in problems.items():
        first_error = int(solution["model_output_solution_first_error_step"]) - 1
        if not 0 <= first_error < len(solution["model_output_steps"]):
            continue
        yield {
            "id": f"mrgsm8k-{name}",
            "problem": solution["question"].strip(),
            **_labelled_steps(solution["model_output_steps"], first_error),
            "solution_correct": False,
            "answer_correct": solution["model_output_answer_correctness"] == "correct",
            "gold": str(solution["ground_truth_answer"]),
            "label_type": "human_first_error",
            "subset": solution["question_type"],
            "generator": None,
            "source": "MR-GSM8K",
            "error_reason": solution["model_output_solution_first_error_reason"][:240],
        }


def _mr_ben(sources: Sources, entry: Row) -> Iterator[Row]:
    (text,) = sources.texts(entry["repository"], entry["commit"], entry["files"])
    for solution in (solution for solutions in json.loads(text).values() for solution in solutions):
        correct = solution["Model_Solution_Correctness"] == "correct"
        if not correct and not str(solution["Model_Solution_First_Error_Step"]).isdigit():
            continue
        first_error = -1 if correct else int(solution["Model_Solution_First_Error_Step"]) - 1
        choice = re.search(r"Choice[_ ]([A-E])", solution["Model_Solution_Steps"][-1])
        gold = solution["Ground_Truth_Answer_Modified"]
        reason = solution["Model_Solution_Error_Reason"]
        yield {
            "id": f"mrben-{solution['Question_UUID']}-{solution['Sampled_Model']}",
            "problem": f"{solution['Question'].strip()}\nOptions: {solution['Options'].strip()}",
            **_labelled_steps(solution["Model_Solution_Steps"], first_error),
            "solution_correct": correct,
            "answer_correct": None if choice is None else choice.group(1) == gold,
            "gold": gold,
            "label_type": "human_first_error",
            "subset": solution["Subject"],
            "generator": solution["Sampled_Model"],
            "source": "Mr-Ben",
            "error_reason": (reason if isinstance(reason, str) else reason[0]).strip()[:240],
        }


# files ------------------------------------------------------------------------------------------------------

_GSM8K: dict[str, tuple[type, ...]] = {"question": (str,), "answer": (str,)}
_PAIR: dict[str, tuple[type, ...]] = {"chosen": (str,), "rejected": (str,)}
_GRADED: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    **_PAIR,
    "score_chosen": (int, float),
    "score_rejected": (int, float),
    "split": (str,),
}
_LABELLED: dict[str, tuple[type, ...]] = {"prompt": (str,), "completion": (str,), "label": (bool,)}
_SOLUTION: dict[str, tuple[type, ...]] = {
    "problem_idx": (int,),
    "solution": (str,),
    "is_correct": (bool,),
    "generator": (str,),
}
_STEPS: dict[str, tuple[type, ...]] = {
    "problem": (str,),
    "steps": (list,),
    "labels": (list,),
    "first_error_step": (int,),
    "source": (str,),
}
DATA_SETS: dict[str, tuple[DataFile, ...]] = {
    "gsm8k": tuple(DataFile(f"gsm8k/{split}.jsonl", _GSM8K, gsm8k(split)) for split in ("train", "test")),
    "gsm8k_solutions": (DataFile("gsm8k/model_solutions.jsonl", _SOLUTION, gsm8k_solutions),),
    "hh_helpful": tuple(
        DataFile(f"preference/hh_helpful_{part}.jsonl", _PAIR, hh_helpful) for part in ("train", "test")
    ),
    "graded_human_votes": (DataFile("preference/graded_human_votes.jsonl", _GRADED, graded_human_votes),),
    "graded_gpt4_scores": (DataFile("preference/graded_gpt4_scores.jsonl", _GRADED, graded_gpt4_scores),),
    "step_labelled": (DataFile("process/step_labelled.jsonl", _STEPS, step_labelled),),
    "ultrainteract": (
        DataFile("ultrainteract_rollouts.jsonl", _LABELLED, ultrainteract_rollouts),
        DataFile("ultrainteract_right_wrong.jsonl", {"prompt": (str,), **_PAIR}, ultrainteract_right_wrong),
    ),
}
STUDIED = tuple(name for name in DATA_SETS if name != "ultrainteract")  # what "all" means


def line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


def digest(rows: Iterable[Row]) -> str:
    """Of the rows' content and order, whatever the spelling of the JSON."""
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(f"{line(row)}\n".encode())
    return sha256.hexdigest()


def row_id(row: Row) -> str:
    return hashlib.sha256(line(row).encode()).hexdigest()[:8]


def check_columns(rows: Sequence[Row], file: DataFile, where: str) -> None:
    """Raises DataError for an empty file, and for the first row that lacks a column or has another type."""
    if not rows:
        raise DataError(
            f"{where}: no rows; expected a JSON object a line with the columns {', '.join(file.columns)}"
        )
    for number, row in enumerate(rows, 1):
        for column, types in file.columns.items():
            is_wrong = column not in row or not isinstance(row[column], types)
            # bool is an int to Python, and not to a data file
            if is_wrong or (bool not in types and isinstance(row[column], bool)):
                got = (
                    type(row[column]).__name__ if column in row else f"the columns {', '.join(map(str, row))}"
                )
                kinds = " or ".join(kind.__name__ for kind in types)
                raise DataError(
                    f"{where}, row {number}: got {got}; expected {column!r} as {kinds} for {file.path}. "
                    "Convert the column, or leave out --from to download the file"
                )


def select(candidates: Iterable[Row], entry: Row, path: str) -> list[Row]:
    """The rows that the manifest lists, in its order; all candidates where it lists none."""
    if "rows" not in entry:
        return list(candidates)
    wanted_ids = " ".join(entry["rows"]).split()
    by_id = {row_id(row): row for row in candidates}
    rows = [by_id[name] for name in wanted_ids if name in by_id]
    absent = len(wanted_ids) - len(rows)
    if absent > ABSENT * len(wanted_ids):
        raise DataError(
            f"{path}: the source has {len(rows)} of the {len(wanted_ids)} rows that {MANIFEST.name} lists; "
            "expected all. The source has changed: name a folder that holds the file with --from FOLDER"
        )
    if absent:
        print(f"{path}: warning: {absent} of {len(wanted_ids)} rows are not in the source and are left out")
    return rows


def read_folder(folder: Path, file: DataFile) -> list[Row]:
    places = [folder / file.path, folder / Path(file.path).name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"{folder}: no {file.path}; expected {places[0]} or {places[1]}. Put the file there, or leave "
            "out --from to download it"
        )
    try:
        rows = json_lines(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: {error}; expected a JSON object a line, in UTF-8. Convert the file"
        ) from error
    not_objects = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]
    if not_objects:
        raise DataError(
            f"{path}, row {not_objects[0]}: not a JSON object; expected one a line. Convert the file"
        )
    check_columns(rows, file, str(path))
    return rows


def write(path: Path, rows: Sequence[Row], *, overwrite: bool) -> None:
    """Whole or not at all; a file with other rows is not replaced unless the user says so."""
    if path.exists() and not overwrite:
        try:
            kept = digest(json_lines(path.read_text(encoding="utf-8")))
        except ValueError:
            kept = ""
        if kept != digest(rows):
            raise DataError(
                f"{path}: exists with other rows; expected no file. Move it away, or add --overwrite"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
    ) as part:
        part.writelines(f"{line(row)}\n" for row in rows)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def get(name: str, out: Path, *, folder: Path | None, sources: Sources, overwrite: bool = False) -> None:
    """The files of the data set ``name`` in ``out``. Raises DataError."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    for file in DATA_SETS[name]:
        entry = manifest[file.path]
        if folder is not None:
            rows = read_folder(folder, file)
        else:
            try:
                rows = select(file.rows(sources, entry), entry, file.path)
            except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                raise DataError(
                    f"{file.path}: {type(error).__name__}: {error}; the source is not laid out as expected. "
                    "Name a folder that holds the file with --from FOLDER"
                ) from error
            check_columns(rows, file, f"source of {file.path}")
        write(out / file.path, rows, overwrite=overwrite)
        remark = ""
        if "digests" in entry:
            negation = "" if digest(rows) in entry["digests"] else "NOT "
            remark = f", {negation}those measured in docs/studies"
        print(f"{out / file.path}: {len(rows)} rows{remark}")


def main(arguments: Sequence[str] | None = None, sources: Sources | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=[*DATA_SETS, "all"], metavar="NAME", help="data sets")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="folder to write to (default: data/)")
    parser.add_argument("--from", dest="folder", type=Path, help="folder that already holds the files")
    parser.add_argument("--overwrite", action="store_true", help="replace files that hold other rows")
    options = parser.parse_args(arguments)
    every_name = [part for name in options.names for part in (STUDIED if name == "all" else (name,))]
    names = list(dict.fromkeys(every_name))
    if options.folder is not None and not options.folder.is_dir():
        sys.exit(f"error: --from {options.folder}: no such folder; expected one that holds the data files")
    try:
        for name in names:
            get(
                name,
                options.out,
                folder=options.folder,
                sources=sources or Sources(),
                overwrite=options.overwrite,
            )
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
