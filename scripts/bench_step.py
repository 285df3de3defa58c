"""Compares whole GRPO steps of rltrain and TRL's GRPOTrainer: trained completion tokens per second and peak
memory, in one run.

    pip install --no-deps --target .cache/trl trl==1.16.0
    python scripts/bench_step.py --trl .cache/trl [--json FILE] [--repeats 5] [--cases short,skewed]
        [--threads 2]

Both train the same model on the same prompts with the same number of completions, float32, one update per
step, AdamW, gradient checkpointing off; each samples its own completions from the same distribution. First,
both compute the loss and its gradient on the same batch, and must agree.

Two more cases train a real model on questions of GSM8K in its chat template, in float32 and in bfloat16:

    rltrain get-model smollm2 --out .cache/smollm2
    python scripts/bench_step.py --trl .cache/trl --cases smollm2,smollm2_bf16 --model .cache/smollm2
        --texts FILE.jsonl      # rows with a "question"
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peer_bench import PAD, TRL_GRPO, Bench, Real, Size, Turns, gradients_at_step, make_model, text_of

LR = 1e-6
REWARD = """import hashlib

from rltrain.reward.score import Score


def worth(text):
    return float(hashlib.sha256(text.encode()).digest()[0] % 2)


def reward(inputs):
    return [Score(worth(text)) for text in inputs.completions]
"""


@dataclass(frozen=True)
class Case:
    model: Size | None  # None: a real one, which reads its prompts in its chat template
    prompt_tokens: int  # of a real model: at most
    prompts: int  # per step
    n: int  # completions of each
    max_tokens: int
    precision: Literal["float32", "bfloat16"] = "float32"


CASES = {
    "short": Case(Size(128, 4, 64), 8, 8, 8, 8),  # 0.8M parameters
    # 12M parameters; lengths geometric with mean about 60, cut at 256
    "skewed": Case(Size(256, 6, 32768, -4.1), 100, 4, 8, 256),
    "smollm2": Case(None, 320, 4, 4, 128),
    "smollm2_bf16": Case(None, 320, 4, 4, 128, "bfloat16"),
}


def make(case: Case, folder: Path, real: Real) -> None:
    """Writes a model, prompts, and a reward of 0 or 1 that no policy can learn, so that every step has a
    gradient.
    """
    (folder / "reward.py").write_text(REWARD)
    prompts: list[Any]
    if case.model is None:
        real.link_model(folder / "model")
        prompts = [[{"role": "user", "content": row["question"]}] for row in real.rows()[: 64 * case.prompts]]
    else:
        make_model(case.model, folder / "model")
        prompts = [text_of(row) for row in random_tokens(case, case.model.vocabulary)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))


def random_tokens(case: Case, vocabulary: int) -> list[list[int]]:
    import torch

    shape = (64 * case.prompts, case.prompt_tokens)
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1)).tolist()


def recipe_of(case: Case, folder: Path) -> Any:
    from rltrain.config.schema import OnlineRecipe

    return OnlineRecipe.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {
                "train": str(folder / "prompts.jsonl"),
                "max_prompt_tokens": case.prompt_tokens,
                "chat_template": "auto" if case.model is None else "none",
            },
            "rollout": {"prompts": case.prompts, "n": case.n, "max_tokens": case.max_tokens},
            "reward": {"functions": [f"{folder / 'reward.py'}:reward"], "workers": 1},
            "advantage": "group_norm",
            "loss": {"policy": "clip", "aggregate": "token_mean"},
            "learner": {"optimizer": {"lr": LR}, "precision": case.precision},
            "train": {"steps": 1_000_000},
            "report": {"transcripts": 0},
        }
    )


def run_rltrain(case: Case, folder: Path, turns: Turns) -> None:
    """The loop of ``rltrain train``; its reporter takes the turns."""
    from rltrain.build.context import RunContext
    from rltrain.build.inputs import load_inputs
    from rltrain.build.online import build_online_run
    from rltrain.checkpoint.run_folder import RunFolder
    from rltrain.process import Process
    from rltrain.report.reporter import Reporter
    from rltrain.train.online import train_online

    class Gate(Reporter):
        def step(self, step: int, metrics: Any, *more: Any) -> None:
            turns.step(int(metrics["rollout/tokens"]))

    recipe = recipe_of(case, folder)
    inputs = load_inputs(recipe)
    with inputs.grader:
        (folder / "run").mkdir()  # for the timeline
        context = RunContext(RunFolder.from_path(folder / "run"), process=Process(is_main=False))
        run = build_online_run(recipe, inputs, context)
        train_online(dataclasses.replace(run, reporter=Gate(None, None, None)))


def run_trl(case: Case, folder: Path, turns: Turns) -> None:
    from transformers import TrainerCallback

    counted: list[int] = []

    class Gate(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            turns.step(sum(counted))
            counted.clear()

    trainer = trl_trainer(case, folder, counted)
    trainer.add_callback(Gate())
    trainer.train()


def trl_trainer(case: Case, folder: Path, counted: list[int]) -> Any:
    """TRL's trainer with rltrain's default settings. counted: a list to which the lengths of the graded
    completions are added.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    worth = runpy.run_path(str(folder / "reward.py"))["worth"]

    def reward(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        counted.extend(map(len, completion_ids))
        texts = completions if case.model is not None else [message["content"] for (message,) in completions]
        return [worth(text) for text in texts]

    rows = case.prompts * case.n
    arguments = GRPOConfig(
        **TRL_GRPO,
        output_dir=str(folder / "trl"),
        bf16=case.precision == "bfloat16",
        per_device_train_batch_size=rows,
        num_generations=case.n,
        max_completion_length=case.max_tokens,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
    )
    data: Any = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left", trust_remote_code=False)
    return GRPOTrainer(str(folder / "model"), reward, arguments, data, processing_class=tokenizer)


def trl_loss(case: Case, folder: Path, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """TRL's loss on the batch ``inputs``, and its gradients by parameter."""
    trainer = trl_trainer(case, folder, [])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def run_same_loss(case: Case, folder: Path, turns: Turns) -> None:
    """Computes loss and gradient of both trainers on one batch of random completions, in float32; reports
    their relative differences.
    """
    import torch
    from transformers import AutoConfig

    from rltrain.build.online import build_learner, build_objective
    from rltrain.types.policy import TokenRows, TrainBatch

    case = dataclasses.replace(case, precision="float32")
    vocabulary = AutoConfig.from_pretrained(folder / "model", trust_remote_code=False).vocab_size
    generator = torch.Generator().manual_seed(2)
    rows = case.prompts * case.n
    width = case.max_tokens
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    prompts = torch.randint(3, vocabulary, (rows, case.prompt_tokens), generator=generator)
    completions = torch.randint(3, vocabulary, (rows, width), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    advantages = torch.randn(rows, generator=generator)

    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions.masked_fill(~mask, PAD),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    loss, trl_gradients = trl_loss(case, folder, inputs)

    recipe = recipe_of(case, folder)
    unclipped = recipe.learner.optimizer.model_copy(update={"max_grad_norm": 1e9})
    recipe = recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"optimizer": unclipped})})
    learner = build_learner(recipe.model, recipe.learner, recipe.rollout, recipe.train.steps, recipe.seed)
    zeros = torch.zeros(rows, dtype=torch.int64)
    batch = TrainBatch(
        mask, advantages[:, None].expand(mask.shape), torch.ones(mask.shape), advantages, zeros, zeros, zeros
    )
    completion_ids = tuple(
        tuple(row[:length]) for row, length in zip(completions.tolist(), lengths.tolist(), strict=True)
    )
    token_rows = TokenRows(tuple(map(tuple, prompts.tolist())), completion_ids)
    gradients = gradients_at_step(learner)
    stats = learner.update(token_rows, batch, build_objective(recipe.loss, {}))
    size = torch.stack([gradient.norm() for gradient in trl_gradients.values()]).norm()
    difference = torch.stack(
        [(gradients[name] - trl_gradients[name]).norm() for name in trl_gradients]
    ).norm()
    differences = {
        "loss": abs(stats.metrics["loss/total"] - float(loss)),
        "gradient": float(difference / size),
        "theirs": float(loss),
    }
    turns.say(differences)


if __name__ == "__main__":
    workers = {"rltrain": run_rltrain, "trl": run_trl, "same_loss": run_same_loss}
    real = [name for name, case in CASES.items() if case.model is None]
    Bench(Path(__file__).resolve(), "tokens", CASES, make, workers, real).main(__doc__ or "")
