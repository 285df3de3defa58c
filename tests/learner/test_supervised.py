"""Supervised fine-tuning: the mean over the scored tokens of the unmarked update, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from data.test_conversations import MARKED
from rltrain.config.schema import JudgedData, LearnerCore, Model, Optimizer
from rltrain.data.judged import Reader
from rltrain.data.labels import LabelSet, load_labels
from rltrain.learner.frozen_logprobs import cache_key
from rltrain.learner.preference_learner import PreferenceLearner, lengths_of
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.train.examples import Examples, examples_of_labels, mismatched_rows, rows_of_labels, select_rows
from rltrain.types.policy import TokenRows

TALKS = (
    [("one", "two")],
    [("three", "four"), ("five", "no")],
    [("a", "b"), ("c", "d"), ("e", "f")],
    [("what is 27 + 14?", "41")],
)
# of TRL 1.16's SFTTrainer with assistant_only_loss on these conversations and this model
TRL = {"loss": 4.730281829833984, "grad_norm": 4.730391188800135, "tokens": 21}
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")  # keeps gradients in place of a step
NLL = PreferenceObjective(PREFERENCE_LOSSES.bind("nll", {}))


@pytest.fixture(scope="module")
def folder(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_models.character_tokenizer()
    tiny_models.tiny_model(tokenizer, tied=True, seed=3, layers=2, width=64).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def conversations(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> LabelSet:
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    roles = ("user", "assistant")
    rows = [
        [
            dict(zip(("role", "content"), turn, strict=True))
            for pair in talk
            for turn in zip(roles, pair, strict=True)
        ]
        for talk in TALKS
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    tokenizer = tiny_models.character_tokenizer()
    tokenizer.chat_template = MARKED
    data = JudgedData(train=str(path))
    reader = Reader(tokenizer, (tokenizer.eos_token_id,), data)
    return load_labels(data, "train", reader, seed=0, needs=frozenset())


def learner_of(path: str, **settings: Any) -> PreferenceLearner:
    optimizer = Optimizer(lr=1e-3, max_grad_norm=1e9)
    return PreferenceLearner(
        Model(path=path), LearnerCore(optimizer=optimizer, **settings), total_updates=10, seed=0
    )


def examples_of(conversations: LabelSet) -> Examples:
    return examples_of_labels(conversations.completions, {})


@pytest.mark.parametrize(
    "settings", [{}, {"layout": "packed"}, {"tokens_per_micro_batch": 24}, {"head_chunk": 3}]
)
def test_the_loss_is_trls_in_every_layout(
    folder: str, conversations: LabelSet, settings: dict[str, Any]
) -> None:
    examples = examples_of(conversations)
    assert int(lengths_of(examples.rows).sum()) == TRL["tokens"]
    rows, batch, _ = examples.batch(range(len(examples)), 1)
    update = learner_of(folder, **settings).update_examples(rows, batch, NLL)
    assert update.metrics["loss/total"] == pytest.approx(TRL["loss"], rel=1e-5)
    assert update.metrics["learner/grad_norm"] == pytest.approx(TRL["grad_norm"], rel=1e-4)


def test_the_gradient_is_a_plain_loops(folder: str, conversations: LabelSet) -> None:
    examples = examples_of(conversations)
    rows, batch, _ = examples.batch(range(len(examples)), 1)
    assert rows.scored is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = torch.zeros(())
    for prompt, completion, scored in zip(rows.prompts, rows.completions, rows.scored, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        targets = torch.tensor(
            [token if flag else -100 for token, flag in zip(completion, scored, strict=True)]
        )
        total = total + cross_entropy(logits, targets, reduction="sum")
    (total / sum(map(sum, rows.scored))).backward()

    learner = learner_of(folder, tokens_per_micro_batch=24)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:
        named = learner.trained.unwrapped_model.named_parameters()
        gradients.update({name: weight.grad.clone() for name, weight in named if weight.grad is not None})

    learner.trained.backend.optimizer.step = keep  # type: ignore[method-assign]
    learner.update_examples(rows, batch, NLL)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[f"model.{name}"], parameter.grad, atol=2e-6, rtol=1e-4)


def test_log_probs_and_entropies_are_sums_over_scored_tokens(folder: str, conversations: LabelSet) -> None:
    rows = rows_of_labels(conversations.completions)
    assert rows.scored is not None
    learner = learner_of(folder)
    unmarked = TokenRows(rows.prompts, rows.completions)
    tokens = learner.token_log_probs(unmarked)
    expected = [
        sum(float(value) for value, flag in zip(line, scored, strict=False) if flag)
        for line, scored in zip(tokens, rows.scored, strict=True)
    ]
    logp, entropy = learner.log_probs_and_entropy(rows, sides=1)
    torch.testing.assert_close(logp, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert entropy is not None
    _, all_entropy = learner.log_probs_and_entropy(unmarked, sides=1)
    assert all_entropy is not None and bool((entropy <= all_entropy + 1e-6).all())
    assert float(entropy[2]) < float(all_entropy[2]) - 1  # three turns with the questions between them


def test_scored_tokens_follow_their_rows(conversations: LabelSet) -> None:
    rows = rows_of_labels(conversations.completions)
    assert rows.scored is not None and len(rows) == 4
    assert select_rows(rows, [2, 0], 1).scored == (rows.scored[2], rows.scored[0])
    others = mismatched_rows(rows, torch.arange(4), seed=0, step=1)
    assert others.scored is not None
    by_completion = dict(zip(rows.completions, rows.scored, strict=True))
    assert [by_completion[completion] for completion in others.completions] == list(others.scored)
    # cached log-probs are of these tokens
    plain = TokenRows(rows.prompts, rows.completions)
    assert cache_key(rows, "w", {}) != cache_key(plain, "w", {})
    with pytest.raises(ValueError, match="every completion token is one or the other"):
        TokenRows(rows.prompts, rows.completions, rows.scored[:3])


# runs -------------------------------------------------------------------------------------------------------


def test_a_shipped_template_writes_turns_with_their_end(tiny_models: ModuleType, tmp_path: Path) -> None:
    template = Path(__file__).parents[2] / "recipes" / "base" / "turns.jinja"
    tokenizer = tiny_models.character_tokenizer()
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>\na<eos>\n<|assistant|>\nb<eos>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|assistant|>\n")
