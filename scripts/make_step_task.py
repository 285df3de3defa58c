"""Chains of sums with exact labels of every step: problems, a tiny model that solves some of them, and its
judged solutions.

    python scripts/make_tiny_model.py --out .cache/tiny-model                         # a model that almost
    knows how to add
    python scripts/make_step_task.py model --out .cache/chains                        # problems, and that
    model made to add in chains
    python scripts/make_step_task.py samples --out .cache/chains --split train --n 8  # solutions with labels
    of outcome and steps

``7+8+4=`` is solved in lines, ``07+8=15``, ``15+4=19``, ``A:19``. There is one right solution, so the first
step that differs from it is the first wrong one. What follows a wrong step is judged by itself: it is right
where it goes on rightly from what stands there. The labels of steps are for measuring; what a process reward
model is trained on is the outcome alone.
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
from make_tiny_model import IGNORED, reproducible, save_model
from torch.nn.functional import cross_entropy
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from rltrain.analysis.first_error import first_wrong
from rltrain.config.load import load_recipe
from rltrain.config.schema import OnlineRecipe
from rltrain.seeds import stable_hash

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "studies" / "process_reward" / "chains.yaml"
SPLITS = {"train": 4000, "dev": 200, "test": 400}  # problems
WARM_UP = 40_000  # further ones, that the model learns from before it is asked anything
OPERANDS = 6  # of one digit each
MOST_STEPS, RIGHT = 1000, 0.3  # of the warm start: it stops when a whole solution is right so often
BATCH, LEARNING_RATE, WARMUP_STEPS, SHOWN = 64, 2e-3, 20, 20
_SUM = re.compile(r"(\d+)\+(\d+)=(\d+)")
_ANSWER = re.compile(r"A:(\d+)")


def operands(prompt: str) -> list[int]:
    """``7+8+4=`` to 7, 8, 4."""
    return [int(number) for number in prompt.removesuffix("=").split("+")]


def solution(prompt: str) -> list[str]:
    """The lines of the one right solution."""
    total, *others = operands(prompt)
    lines: list[str] = []
    for number in others:
        lines.append(f"{total:02}+{number}={total + number:02}")
        total += number
    return [*lines, f"A:{total:02}"]


def steps_of(completion: str) -> list[str]:
    """Lines with text in them, as ``rltrain score --steps newline`` cuts them."""
    return [line for line in completion.split("\n") if line.strip()]


def first_error(prompt: str, steps: Sequence[str]) -> int | None:
    """The first step that is not the right solution's; where all are and some are missing, the last.

    None: the solution is right.
    """
    expected = solution(prompt)
    wrong = first_wrong([at < len(expected) and step == expected[at] for at, step in enumerate(steps)])
    return len(steps) - 1 if wrong is None and len(steps) < len(expected) else wrong


def right_steps(prompt: str, steps: Sequence[str]) -> list[bool]:
    """Whether each step is right by itself: it goes on from the result that stands before it with the
    next operand, and adds rightly.
    """
    before, *others = operands(prompt)
    found: list[bool] = []
    for at, step in enumerate(steps):
        if at < len(others):
            line = _SUM.fullmatch(step)
            found.append(
                line is not None
                and (int(line[1]), int(line[2])) == (before, others[at])
                and int(line[3]) == before + others[at]
            )
            before = int(line[3]) if line is not None else before
        else:
            answer = _ANSWER.fullmatch(step)
            found.append(at == len(others) and answer is not None and int(answer[1]) == before)
    return found


def problems(split: str, count: int) -> Iterator[dict[str, Any]]:
    """``count`` of them, no two alike. A hash of the text decides the split, so none is in two."""
    draw, names, seen = random.Random(stable_hash("chains", split)), (*SPLITS, "warm up"), set[str]()
    while len(seen) < count:
        prompt = "+".join(str(draw.randint(1, 9)) for _ in range(OPERANDS)) + "="
        if prompt not in seen and names[stable_hash("split", prompt) % len(names)] == split:
            seen.add(prompt)
            yield {"prompt": prompt, "answer": str(sum(operands(prompt))), "problem": len(seen) - 1}


def judged(problem: dict[str, Any], completion: str, label: bool, answer: str | None) -> dict[str, Any]:
    """A row for training and for measuring. label: whether the grader of the run called the answer
    right, which it read as ``answer``.
    """
    steps = steps_of(completion)
    wrong = first_error(problem["prompt"], steps) if steps else None
    columns = {
        "prompt": problem["prompt"],
        "problem": problem["problem"],
        "completion": completion,
        "label": label,
        "answer": answer,
    }
    return columns | {
        "first_error": -1 if wrong is None else wrong,
        "right": right_steps(problem["prompt"], steps),
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def make_model(out: Path, *, start: str, seed: int, steps: int, right: float, warm_up: int) -> None:
    """The problems of every split, and the model at ``start`` after it learned from worked solutions
    of others.
    """
    for split, count in SPLITS.items():
        write(out / f"{split}.jsonl", list(problems(split, count)))
    tokenizer, model = (
        Qwen2Tokenizer.from_pretrained(start),
        Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32),
    )
    examples = [
        (_asked(one["prompt"], tokenizer), _told(one["prompt"], tokenizer))
        for one in problems("warm up", warm_up)
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
    """Learns solutions until a sampled one is right with probability ``right``, which comes back.

    Loss on solutions only; one thread.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    generator, recent, started = random.Random(seed), list[float](), time.perf_counter()
    with reproducible(threads=1):
        model.train()
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
            chosen = generator.sample(examples, BATCH)
            longest = max(len(asked) + len(told) for asked, told in chosen)
            ids = torch.tensor(
                [asked + told + [0] * (longest - len(asked) - len(told)) for asked, told in chosen]
            )
            blank = [
                [IGNORED] * len(asked) + told + [IGNORED] * (longest - len(asked) - len(told))
                for asked, told in chosen
            ]
            labels = torch.tensor(blank)[:, 1:]
            nll = cross_entropy(
                model(input_ids=ids).logits[:, :-1].transpose(1, 2),
                labels,
                ignore_index=IGNORED,
                reduction="none",
            )
            recent.append(nll.detach().sum(1).neg().exp().mean().item())
            loss = nll.sum() / (labels != IGNORED).sum()
            mean = sum(recent[-SHOWN:]) / SHOWN
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


def make_samples(out: Path, *, split: str, n: int, seed: int, count: int | None, model: str | None) -> None:
    """``n`` solutions of each problem of ``split``, sampled and graded as an evaluation of the recipe
    samples and grades.
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
        judged(
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
    right, wrong = [row for row in rows if row["label"]], [row for row in rows if row["first_error"] >= 0]
    lucky = sum(row["label"] for row in wrong)
    print(
        f"right {len(right)} of {len(rows)}, with a wrong step {len(wrong)}, of them {lucky} with the right "
        "answer after all"
    )


def _question(text: str) -> str:
    """The problem out of what the model reads, which is ``<user>7+8+4=<assistant>``."""
    found = re.search(r"[\d+]+=", text)
    assert found is not None
    return found[0]


def _asked(prompt: str, tokenizer: Qwen2Tokenizer) -> list[int]:
    spelt = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(spelt, add_special_tokens=False)["input_ids"])


def _told(prompt: str, tokenizer: Qwen2Tokenizer) -> list[int]:
    return [
        *tokenizer("\n".join(solution(prompt)), add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="problems, and the model that learned from others")
    model.add_argument("--start", default=".cache/tiny-model", help="model with a tokenizer of characters")
    model.add_argument("--steps", type=int, default=MOST_STEPS, help="of the warm start, at most")
    model.add_argument(
        "--right", type=float, default=RIGHT, help="stop when a whole solution is right so often"
    )
    model.add_argument(
        "--warm-up", type=int, default=WARM_UP, help="problems that the warm start learns from"
    )
    samples = commands.add_parser("samples", help="judged solutions of one split")
    samples.add_argument("--split", choices=SPLITS, default="train")
    samples.add_argument("--n", type=int, default=8, help="solutions per problem")
    samples.add_argument("--count", type=int, help="problems; by default all of the split")
    samples.add_argument("--model", help="sample from this one in place of OUT/model")
    for command in (model, samples):
        command.add_argument("--out", type=Path, required=True, help="folder of everything")
        command.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    run = {"model": make_model, "samples": make_samples}[options.pop("command")]
    run(options.pop("out"), **options)


if __name__ == "__main__":
    main()
