"""Makes real solutions with their outcomes, split by problem, and a small language model of such text as a
starting model.

    python scripts/make_outcome_task.py --out .cache/outcomes \
        --gsm8k data/gsm8k --steps data/process/step_labelled.jsonl

``python scripts/get_data.py gsm8k gsm8k_solutions step_labelled`` gets these files. ``--gsm8k`` holds GSM8K's
``train.jsonl`` and ``test.jsonl`` and OpenAI's ``model_solutions.jsonl``: four solutions by GPT-3 of every
TEST problem, labelled right or wrong. Models trained on these files must therefore not be evaluated on
GSM8K's test set. The split is by problem, not by solution; all problems with step labels in ``--steps``, and
all that share a passage with one, are held out. The model learns from GSM8K's training set with its worked
solutions, and from the solutions of the training split, right or wrong.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from make_text_model import BLOCK, BLOCKS, encode, pretrain, train_tokenizer

from rltrain.build.tiny_model import save_model, tiny_model
from rltrain.seeds import stable_hash

VOCABULARY = 2048
LAYERS = 4
WIDTH = 128
STEPS = 300  # updates of the language model, of BLOCK * BLOCKS tokens each
WORKED = 3000  # worked solutions of GSM8K's training set in its training text
HELD_OUT = 0.3  # share of problems
PASSAGE = 8  # problems that share this many consecutive words count as one problem
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {len({row['problem'] for row in rows})} problems")


def divide_by_problem(rows: Sequence[Row], held_out: set[int]) -> dict[str, list[Row]]:
    """The rows split by problem: held-out problems in "test", one in ten of the others in "dev"."""
    train = sorted({row["problem"] for row in rows} - held_out)
    dev = set(random.Random(stable_hash("dev")).sample(train, len(train) // 10))
    side = {
        problem: "test" if problem in held_out else "dev" if problem in dev else "train"
        for problem in {*train, *held_out}
    }
    return {name: [row for row in rows if side[row["problem"]] == name] for name in ("train", "dev", "test")}


def passages(text: str) -> set[tuple[str, ...]]:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return {tuple(words[start : start + PASSAGE]) for start in range(max(len(words) - PASSAGE + 1, 1))}


def held_out_problems(questions: Sequence[str], labelled: Sequence[str], share: float) -> set[int]:
    """Numbers of the questions that share a passage with a labelled problem, and of random others, up to
    ``share`` of all.
    """
    labelled_passages = set[tuple[str, ...]]().union(*map(passages, labelled))
    overlapping = {
        number for number, question in enumerate(questions) if passages(question) & labelled_passages
    }
    candidates = random.Random(stable_hash("held out")).sample(
        [number for number in range(len(questions)) if number not in overlapping],
        len(questions) - len(overlapping),
    )
    return overlapping | set(candidates[: max(0, round(share * len(questions)) - len(overlapping))])


def outcome_rows(solutions: Sequence[Row], questions: Sequence[str]) -> list[Row]:
    return [
        {
            "prompt": questions[solution["problem_idx"]],
            "completion": solution["solution"],
            "label": solution["is_correct"],
            "answer": solution["solution"].rpartition("A:")[2].strip() or None,
            "problem": solution["problem_idx"],
            "generator": solution["generator"],
        }
        for solution in solutions
        if solution["solution"].strip()
    ]


def step_rows(labelled: Sequence[Row], source: str) -> list[Row]:
    """Solutions whose first wrong step a person marked.

    Later steps without a label have null.
    """
    rows = [
        row
        for row in labelled
        if row["source"] == source and row["first_error_step"] >= 0 and all(map(str.strip, row["steps"]))
    ]
    return [
        {
            "prompt": row["problem"],
            "completion": "\n".join(row["steps"]),
            "steps": row["steps"],
            "right": [None if label is None else bool(label) for label in row["labels"]],
            "problem": row["problem"],
        }
        for row in rows
    ]


def make(gsm8k: Path, steps: Path, out: Path, *, updates: int, seed: int) -> None:
    """Writes files and model to ``out``. updates: of the language model."""
    questions = [row["question"] for row in read(gsm8k / "test.jsonl")]
    labelled = read(steps)
    held_out = held_out_problems(questions, [row["problem"] for row in labelled], HELD_OUT)
    sides = divide_by_problem(outcome_rows(read(gsm8k / "model_solutions.jsonl"), questions), held_out)
    for name, rows in sides.items():
        write(out / f"{name}.jsonl", rows)
    for source in ("MR-GSM8K", "Mr-Ben"):
        write(out / f"steps.{source.lower()}.jsonl", step_rows(labelled, source))
    worked = [
        {"prompt": parameter["question"], "completion": parameter["answer"].replace("#### ", "A: ")}
        for parameter in read(gsm8k / "train.jsonl")
    ]
    texts = random.Random(seed).sample(worked, WORKED) + sides["train"]
    tokenizer = train_tokenizer(
        [text for row in texts for text in (row["prompt"], row["completion"])], VOCABULARY
    )
    model = tiny_model(tokenizer, tied=True, seed=seed, layers=LAYERS, width=WIDTH)
    texts = random.Random(seed).sample(texts, len(texts))
    stream = [
        token
        for row in texts
        for token in encode((("user", row["prompt"]), ("assistant", row["completion"])), tokenizer)
    ]
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    passes = updates * BLOCK * BLOCKS / len(stream)
    print(f"{size:.1f}M parameters, {len(texts)} texts of {len(stream)} tokens, {passes:.1f} passes")
    pretrain(model, stream, steps=updates, seed=seed)
    save_model(model, tokenizer, out / "model")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder of GSM8K's files")
    parser.add_argument("--steps", type=Path, required=True, help="solutions with labels of steps")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything")
    parser.add_argument("--updates", type=int, default=STEPS, help="of the language model")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    make(options.pop("gsm8k"), options.pop("steps"), options.pop("out"), **options)


if __name__ == "__main__":
    main()
