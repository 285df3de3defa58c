"""Makes chains of sums with an exact label for every step: problems, a tiny model that solves some of them,
and its labelled solutions.

    # a model that nearly knows how to add
    rltrain tiny-model --out .cache/tiny-model
    # problems, and that model trained to add in chains
    python scripts/make_step_task.py model --out .cache/chains
    # solutions with labels of outcome and steps
    python scripts/make_step_task.py samples --out .cache/chains --split train --n 8

``7+8+4=`` is solved in lines, ``07+8=15``, ``15+4=19``, ``A:19``. There is one right solution, so the first
step that differs from it is the first wrong step. A step after a wrong step is judged by itself: it is right
if it continues correctly from the previous result. The step labels are for evaluation only; process reward
models are trained on the outcome alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from rltrain.analysis.first_error import first_wrong
from rltrain.build.tiny_model import IGNORED, reproducible, save_model
from rltrain.config.load import load_recipe
from rltrain.config.schema import OnlineRecipe
from rltrain.seeds import stable_hash

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "studies" / "process_reward" / "chains.yaml"
SPLITS = {"train": 4000, "dev": 200, "test": 400}  # problems
WARM_UP = 40_000  # further problems, for the model's warm start
OPERANDS = 6  # of one digit each
MAX_STEPS = 1000  # of the warm start
RIGHT = 0.3  # the warm start stops at this probability of a right solution
BATCH = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
SHOWN = 20
_SUM = re.compile(r"(\d+)\+(\d+)=(\d+)")
_ANSWER = re.compile(r"A:(\d+)")


def operands(prompt: str) -> list[int]:
    """The numbers of a problem: 7, 8, 4 for ``7+8+4=``."""
    return [int(number) for number in prompt.removesuffix("=").split("+")]


def solution(prompt: str) -> list[str]:
    """The lines of the only right solution."""
    total, *others = operands(prompt)
    lines: list[str] = []
    for number in others:
        lines.append(f"{total:02}+{number}={total + number:02}")
        total += number
    return [*lines, f"A:{total:02}"]


def steps_of(completion: str) -> list[str]:
    """The lines that are not blank, split as by ``rltrain score --steps newline``."""
    return [line for line in completion.split("\n") if line.strip()]


def first_error(prompt: str, steps: Sequence[str]) -> int | None:
    """The first step that differs from the right solution; the last step if only later steps are missing.

    None: the solution is right.
    """
    expected = solution(prompt)
    first = first_wrong(
        [index < len(expected) and step == expected[index] for index, step in enumerate(steps)]
    )
    return len(steps) - 1 if first is None and len(steps) < len(expected) else first


def right_steps(prompt: str, steps: Sequence[str]) -> list[bool]:
    """Whether each step is right by itself: it adds the next operand to the previous result, and the sum is
    right.
    """
    total, *operand_list = operands(prompt)
    verdicts: list[bool] = []
    for index, step in enumerate(steps):
        if index < len(operand_list):
            line = _SUM.fullmatch(step)
            verdicts.append(
                line is not None
                and (int(line[1]), int(line[2])) == (total, operand_list[index])
                and int(line[3]) == total + operand_list[index]
            )
            total = int(line[3]) if line is not None else total
        else:
            answer = _ANSWER.fullmatch(step)
            verdicts.append(index == len(operand_list) and answer is not None and int(answer[1]) == total)
    return verdicts


def problems(split: str, count: int) -> Iterator[dict[str, Any]]:
    """``count`` distinct problems. A hash of the text decides the split, so that no problem is in two."""
    generator = random.Random(stable_hash("chains", split))
    names = (*SPLITS, "warm up")
    prompts: set[str] = set()
    while len(prompts) < count:
        prompt = "+".join(str(generator.randint(1, 9)) for _ in range(OPERANDS)) + "="
        if prompt not in prompts and names[stable_hash("split", prompt) % len(names)] == split:
            prompts.add(prompt)
            yield {"prompt": prompt, "answer": str(sum(operands(prompt))), "problem": len(prompts) - 1}


def judged_row(problem: dict[str, Any], completion: str, label: bool, answer: str | None) -> dict[str, Any]:
    """A row for training and evaluation. label: whether the run's grader called ``answer`` right, the answer
    that it extracted.
    """
    steps = steps_of(completion)
    first = first_error(problem["prompt"], steps) if steps else None
    columns = {
        "prompt": problem["prompt"],
        "problem": problem["problem"],
        "completion": completion,
        "label": label,
        "answer": answer,
    }
    return columns | {
        "first_error": -1 if first is None else first,
        "right": right_steps(problem["prompt"], steps),
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def make_model(out: Path, *, start: str, seed: int, steps: int, right: float, warm_up: int) -> None:
    """Writes the problems of every split, and the model at ``start`` after training on worked solutions of
    other problems.
    """
    for split, count in SPLITS.items():
        write(out / f"{split}.jsonl", list(problems(split, count)))
    tokenizer = Qwen2Tokenizer.from_pretrained(start)
    model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    examples = [
        (_prompt_ids(problem["prompt"], tokenizer), _solution_ids(problem["prompt"], tokenizer))
        for problem in problems("warm up", warm_up)
    ]
    warm_start(model, examples, steps=steps, right=right, seed=seed)
    save_model(model, tokenizer, out / "model")


def warm_start(
    model: Qwen2ForCausalLM,
    examples: Sequence[tuple[list[int], list[int]]],
    *,
    steps: int,
    right: float,
    seed: int,
) -> float:
    """Trains on solutions until a sampled solution is right with probability ``right``; returns the
    probability.

    The loss is on solutions only. Runs on one thread.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    generator = random.Random(seed)
    probabilities: list[float] = []
    started = time.perf_counter()
    with reproducible(threads=1):
        model.train()
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
            batch = generator.sample(examples, BATCH)
            ids, labels = _padded_batch(batch)
            nll = cross_entropy(
                model(input_ids=ids).logits[:, :-1].transpose(1, 2),
                labels,
                ignore_index=IGNORED,
                reduction="none",
            )
            probabilities.append(nll.detach().sum(1).neg().exp().mean().item())
            loss = nll.sum() / (labels != IGNORED).sum()
            mean = sum(probabilities[-SHOWN:]) / SHOWN
            if step % SHOWN == 0 or mean >= right:
                seconds = time.perf_counter() - started
                print(
                    f"step {step}: {loss.item():.3f} nats a token, {mean:.3f} of solutions right, "
                    f"{seconds:.0f} s",
                    flush=True,
                )
            if mean >= right:
                break
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
    return mean


def _padded_batch(batch: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids (rows, length), right-padded with 0, and labels (rows, length - 1), IGNORED outside
    solutions.
    """
    longest = max(len(prompt_ids) + len(solution_ids) for prompt_ids, solution_ids in batch)
    id_rows = []
    label_rows = []
    for prompt_ids, solution_ids in batch:
        padding = longest - len(prompt_ids) - len(solution_ids)
        id_rows.append(prompt_ids + solution_ids + [0] * padding)
        label_rows.append([IGNORED] * len(prompt_ids) + solution_ids + [IGNORED] * padding)
    return torch.tensor(id_rows), torch.tensor(label_rows)[:, 1:]


def make_samples(out: Path, *, split: str, n: int, seed: int, count: int | None, model: str | None) -> None:
    """Writes ``n`` solutions of each problem of ``split``, sampled and graded as in an evaluation of the
    recipe.
    """
    from rltrain.cli.evaluate import evaluate_model

    keys = [
        f"data.train={out / ('dev' if split == 'train' else 'train')}.jsonl",
        f"data.eval={out / split}.jsonl",
    ]
    keys += [f"eval.n={n}", f"eval.k=[1,{n}]", f"eval.prompts={count or SPLITS[split]}", f"seed={seed}"]
    recipe = load_recipe(RECIPE, overrides=keys)
    assert isinstance(recipe, OnlineRecipe)
    _, result = evaluate_model(model or str(out / "model"), recipe)
    rows = [
        judged_row(
            {**group.prompt.columns, "prompt": _question(group.prompt.text)},
            completion.text,
            bool(score.correct),
            score.answer,
        )
        for group in result.groups
        for completion, score in zip(group.completions, group.scores, strict=True)
        if score.ungraded is None and completion.text.strip()
    ]
    write(out / f"samples.{split}.{seed}.jsonl", rows)
    right_count = sum(row["label"] for row in rows)
    rows_with_error = [row for row in rows if row["first_error"] >= 0]
    lucky_count = sum(row["label"] for row in rows_with_error)
    print(
        f"right {right_count} of {len(rows)}, with a wrong step {len(rows_with_error)}, "
        f"of them {lucky_count} with the right answer after all"
    )


def _question(text: str) -> str:
    """The problem in the model's prompt ``<user>7+8+4=<assistant>``."""
    match = re.search(r"[\d+]+=", text)
    assert match is not None
    return match[0]


def _prompt_ids(prompt: str, tokenizer: Qwen2Tokenizer) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _solution_ids(prompt: str, tokenizer: Qwen2Tokenizer) -> list[int]:
    return [
        *tokenizer("\n".join(solution(prompt)), add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="problems, and the model trained on other problems")
    model.add_argument("--start", default=".cache/tiny-model", help="model with a tokenizer of characters")
    model.add_argument("--steps", type=int, default=MAX_STEPS, help="of the warm start, at most")
    model.add_argument(
        "--right", type=float, default=RIGHT, help="stop at this probability of a right solution"
    )
    model.add_argument("--warm-up", type=int, default=WARM_UP, help="problems of the warm start")
    samples = commands.add_parser("samples", help="judged solutions of one split")
    samples.add_argument("--split", choices=SPLITS, default="train")
    samples.add_argument("--n", type=int, default=8, help="solutions per problem")
    samples.add_argument("--count", type=int, help="problems; by default all of the split")
    samples.add_argument("--model", help="sample from this model instead of OUT/model")
    for command in (model, samples):
        command.add_argument("--out", type=Path, required=True, help="folder of everything")
        command.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    run = {"model": make_model, "samples": make_samples}[options.pop("command")]
    run(options.pop("out"), **options)


if __name__ == "__main__":
    main()
