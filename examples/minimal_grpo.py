"""GRPO as a loop that one can read: sample, grade, compare within a prompt, update, push the weights.

    python scripts/make_tiny_model.py --out .cache/tiny-model
    python examples/minimal_grpo.py .cache/tiny-model --steps 30

It trains a tiny model to add two numbers, on the parts of rltrain and without its recipes. What ``rltrain
train`` adds: data sets, graders in processes of their own, evaluation, checkpoints, several GPUs, vLLM.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

from transformers import AutoTokenizer

from rltrain.advantage import ADVANTAGES
from rltrain.advantage.stage import compute_advantages
from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.reward.score import Score
from rltrain.rollout.collate import collate
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.groups import sample_groups
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.types.samples import Prompt, RolloutGroup, Sampling, ScoredGroup

PROMPTS = 32  # different prompts in a step
GROUP = 8  # completions of a prompt, which are compared with one another
MAX_TOKENS = 8
LEARNING_RATE = 2e-4


def draw_prompts(tokenizer: Any, step: int, seed: int) -> tuple[list[Prompt], list[int]]:
    """Sums of two numbers of two digits, and their answers."""
    rng = random.Random(stable_hash(seed, "prompts", step))
    prompts: list[Prompt] = []
    answers: list[int] = []
    for number in range(PROMPTS):
        left, right = rng.randint(10, 99), rng.randint(10, 99)
        messages = [{"role": "user", "content": f"{left}+{right}="}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        prompts.append(Prompt(f"{step}-{number}", tuple(token_ids), text))
        answers.append(left + right)
    return prompts, answers


def grade(group: RolloutGroup, answer: int) -> ScoredGroup:
    """1 for a completion that is the answer, else 0."""
    scores = tuple(Score(float(each.text.strip() == str(answer))) for each in group.completions)
    return ScoredGroup(group.group, group.prompt, group.completions, scores)


def train(model: str, steps: int, seed: int) -> list[float]:
    """The mean reward of each step."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = Learner(optimizer=Optimizer(lr=LEARNING_RATE))
    learner = PolicyLearner(
        Model(path=model),
        settings,
        temperature=1.0,
        max_tokens=MAX_TOKENS,
        total_updates=steps,
        seed=seed,
    )
    engine = TransformersEngine(
        model,
        stop_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        max_rows=PROMPTS * GROUP,
    )
    sync = Sync([engine], learner.names.ties, sample=4, full_every=10, seed=seed)
    advantage = ADVANTAGES.bind("group_norm", {})
    objective = Objective(
        policy_loss=POLICY_LOSSES.bind("clip", {}),
        terms=(),
        aggregate=AGGREGATES.bind("token_mean", {}),
    )

    rewards: list[float] = []
    for step in range(steps):
        # The engine gets the learner's weights, and both say what they hold.
        sync.push(learner.weights, learner.version, expect_change=False)

        prompts, answers = draw_prompts(tokenizer, step, seed)
        sampling = Sampling(GROUP, 1.0, MAX_TOKENS, seed=stable_hash(seed, "sampling", step))
        groups = sample_groups(engine, prompts, sampling, learner.version)
        graded = [grade(group, answer) for group, answer in zip(groups, answers, strict=True)]

        rows, batch = collate(graded)
        batch = compute_advantages(batch, advantage)
        update = learner.update(rows, batch, objective)

        rewards.append(float(batch.rewards.mean()))
        norm = update.metrics["learner/grad_norm"]
        sys.stdout.write(f"step {step + 1}  reward {rewards[-1]:.3f}  gradient {norm:.3f}\n")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.model, arguments.steps, arguments.seed)
