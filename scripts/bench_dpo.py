"""Compares whole DPO steps of rltrain and TRL's DPOTrainer: pairs per second and peak memory, in one run.

    pip install --no-deps --target .cache/trl trl==1.16.0
    python scripts/bench_dpo.py --trl .cache/trl [--json FILE] [--repeats 5] [--threads 2]

The model has 12M parameters and a vocabulary of 32k. A step has 16 pairs with lengths as in HH-RLHF's helpful
pairs (log-normal: prompts around 69 tokens, chosen around 47, rejected around 36), float32, AdamW, gradient
checkpointing off. Both trainers precompute the reference's log-probs, so that a step runs only the policy.
First, both compute the loss and its gradient on the same batch, and must agree.

One more case trains a real model on pairs of texts, as HH-RLHF has them:

    rltrain get-model smollm2 --out .cache/smollm2
    python scripts/bench_dpo.py --trl .cache/trl --cases smollm2 --model .cache/smollm2
        --texts FILE.jsonl      # rows with "chosen" and "rejected", two dialogues with one beginning
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_bench import TRL, Bench, Real, Size, Turns, gradients_at_step, make_model, text_of

LR = 1e-6
BETA = 0.1
# (mean, standard deviation) of the logarithm of the length in tokens over HH-RLHF's helpful pairs, with four
# characters per token
LENGTHS = {"prompt": (4.24, 1.10), "chosen": (3.85, 1.00), "rejected": (3.58, 1.02)}
LONGEST = 512
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Case:
    model: Size | None  # None: a real one
    pairs: int  # per step
    steps: int  # steps of different pairs


CASES = {"hh": Case(Size(256, 6, 32768), 16, 4), "smollm2": Case(None, 8, 8)}
ANSWER = "\n\nAssistant:"  # after which the completion begins
LETTERS = LONGEST  # of a real text; it has no more tokens


def make(case: Case, folder: Path, real: Real) -> None:
    """Writes a model and pairs."""
    if case.model is None:
        real.link_model(folder / "model")
        rows = split_dialogues(real.rows())[: case.pairs * case.steps]
    else:
        make_model(case.model, folder / "model")
        rows = make_pairs(case, case.model.vocabulary)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def split_dialogues(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Prompt and completions of the dialogues that differ in their last answer alone, without long ones."""
    pairs: list[dict[str, str]] = []
    for row in rows:
        (prompt, _, chosen), (other, _, rejected) = (row[kind].rpartition(ANSWER) for kind in SIDES)
        pair = {"prompt": prompt + ANSWER, "chosen": chosen, "rejected": rejected}
        if prompt == other and max(map(len, pair.values())) <= LETTERS and chosen and rejected:
            pairs.append(pair)
    return pairs


def make_pairs(case: Case, vocabulary: int) -> list[dict[str, str]]:
    """Of random words."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def words(kind: str) -> str:
        mean, deviation = LENGTHS[kind]
        length = int(torch.empty(1).log_normal_(mean, deviation, generator=generator).clamp(2, LONGEST))
        text = text_of(torch.randint(3, vocabulary, (length,), generator=generator).tolist())
        return text if kind == "prompt" else f" {text}"

    return [{kind: words(kind) for kind in LENGTHS} for _ in range(case.pairs * case.steps)]


def recipe_of(case: Case, folder: Path) -> Any:
    from rltrain.config.schema import OfflineRecipe

    return OfflineRecipe.model_validate(
        {
            "kind": "offline",
            "model": {"path": str(folder / "model")},
            "data": {
                "train": str(folder / "pairs.jsonl"), "chat_template": "none",
                "max_prompt_tokens": LONGEST, "max_completion_tokens": LONGEST + 1,
            },
            "loss": {"preference": {"name": "dpo", "beta": BETA}},
            "learner": {"optimizer": {"lr": LR}, "precision": "float32"},
            "train": {"examples": case.pairs, "steps": 1_000_000},
            "reference": {"cache": None},
        }
    )  # fmt: skip


def run_rltrain(case: Case, folder: Path, turns: Turns) -> None:
    """The loop of ``rltrain train``; its reporter takes the turns."""
    from rltrain.build.context import RunContext
    from rltrain.build.offline import build_offline_run, load_offline_inputs
    from rltrain.checkpoint.run_folder import RunFolder
    from rltrain.process import Process
    from rltrain.report.reporter import Reporter
    from rltrain.train.offline import train_offline

    class Gate(Reporter):
        def step(self, step: int, metrics: Any, *more: Any) -> None:
            turns.step(case.pairs)

    recipe = recipe_of(case, folder)
    (folder / "run").mkdir()  # for the timeline
    context = RunContext(RunFolder.from_path(folder / "run"), process=Process(is_main=False))
    run = build_offline_run(recipe, load_offline_inputs(recipe), context)
    train_offline(dataclasses.replace(run, reporter=Gate(None, None, None)))


def run_trl(case: Case, folder: Path, turns: Turns) -> None:
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            turns.step(case.pairs)

    trainer = trl_trainer(case, folder)
    trainer.add_callback(Gate())
    trainer.train()


def trl_trainer(case: Case, folder: Path) -> Any:
    """TRL's trainer with rltrain's default settings."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        **TRL,
        output_dir=str(folder / "trl"),
        bf16=False,
        per_device_train_batch_size=case.pairs,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=case.pairs,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
    )
    data: Any = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)
    return DPOTrainer(str(folder / "model"), args=arguments, train_dataset=data, processing_class=tokenizer)


def trl_loss(case: Case, folder: Path, examples: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """TRL's loss on the examples, and its gradients by parameter."""
    trainer = trl_trainer(case, folder)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def run_same_loss(case: Case, folder: Path, turns: Turns) -> None:
    """Computes loss and gradient of both trainers on the first pairs, with reference log-probs that differ
    from the policy's; reports their differences.
    """
    import torch
    from transformers import AutoTokenizer

    from rltrain.build.offline import build_preference_learner
    from rltrain.learner.preference_learner import lengths_of, pair_rows
    from rltrain.loss.preference import PREFERENCE_LOSSES
    from rltrain.loss.preference.objective import PreferenceObjective
    from rltrain.process import ALONE
    from rltrain.types.preference import CompletionFacts, PairBatch

    recipe = recipe_of(case, folder)
    learner = build_preference_learner(recipe.model, recipe.learner, recipe.loss, 1, recipe.seed, None, ALONE)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()[: case.pairs]]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)
    ids = {kind: [tuple(tokenizer.encode(line[kind])) for line in lines] for kind in ("prompt", *SIDES)}
    sides = {kind: [(*tokens, tokenizer.eos_token_id) for tokens in ids[kind]] for kind in SIDES}
    rows = pair_rows(ids["prompt"], sides["chosen"], sides["rejected"])
    reference = learner.log_probs(rows, sides=2) + torch.randn(
        2 * case.pairs, generator=torch.Generator().manual_seed(3)
    )
    examples = [
        {
            "prompt_ids": list(ids["prompt"][index]),
            "chosen_ids": list(sides["chosen"][index]),
            "rejected_ids": list(sides["rejected"][index]),
            "ref_chosen_logps": float(reference[index]),
            "ref_rejected_logps": float(reference[case.pairs + index]),
        }
        for index in range(case.pairs)
    ]
    loss, trl_gradients = trl_loss(case, folder, examples)

    gradients = gradients_at_step(learner)
    facts = [
        CompletionFacts(*columns)
        for columns in zip(lengths_of(rows).chunk(2), reference.chunk(2), strict=True)
    ]
    batch = PairBatch(*facts, prompt=torch.arange(case.pairs))
    stats = learner.update_examples(
        rows, batch, PreferenceObjective(PREFERENCE_LOSSES.bind("dpo", {"beta": BETA}))
    )
    size = torch.stack([gradient.norm() for gradient in trl_gradients.values()]).norm()
    # rltrain's gradients are already clipped; dividing by the factor undoes it
    factor = min(1.0, recipe.learner.optimizer.max_grad_norm / float(stats.metrics["learner/grad_norm"]))
    difference = torch.stack(
        [(gradients[name] / factor - trl_gradients[name]).norm() for name in trl_gradients]
    ).norm()
    turns.say(
        {
            "loss": abs(stats.metrics["loss/total"] - float(loss)),
            "gradient": float(difference / size),
            "theirs": float(loss),
        }
    )


if __name__ == "__main__":
    workers = {"rltrain": run_rltrain, "trl": run_trl, "same_loss": run_same_loss}
    real = [name for name, case in CASES.items() if case.model is None]
    Bench(Path(__file__).resolve(), "pairs", CASES, make, workers, real).main(__doc__ or "")
