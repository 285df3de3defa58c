"""A reward model in this process: it gives transformers' numbers in every batch, reads the right text, and
refuses unsuitable models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from rltrain.errors import UserError
from rltrain.learner.reward_learner import load_reward_model
from rltrain.learner.reward_model import RewardModel
from rltrain.reward.score import RewardInputs

CPU = torch.device("cpu")
TEXTS = ((5, 6, 9), (5, 10, 11, 12, 13), (7,), (8, 2, 2), (5, 6, 9))


def save(folder: Path, model: Any, start: str) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reward_model(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder with a random head, whose pad token also ends texts, as in many published folders."""
    torch.manual_seed(0)
    model = load_reward_model(random_model, None, "auto")
    model.config.pad_token_id = 1
    return save(tmp_path_factory.mktemp("reward"), model, random_model)


def load(path: str, **changes: Any) -> RewardModel:
    settings: dict[str, Any] = {
        "prompt_column": None,
        "max_tokens": 64,
        "device": CPU,
        "tokens_per_micro_batch": 64,
    }
    return RewardModel(path, **(settings | changes))


def by_transformers(path: str, texts: Sequence[tuple[int, ...]]) -> list[float]:
    """One text at a time, without padding, and with a pad token that none of them contains."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    model.config.pad_token_id = 0
    with torch.no_grad():
        return [float(model(torch.tensor([text])).logits) for text in texts]


def inputs(*completions: str, ids: Sequence[tuple[int, ...]] = (), **columns: Any) -> RewardInputs:
    count = len(completions)
    return RewardInputs(
        "37+58=",
        completions,
        (1,) * count,
        ("stop",) * count,
        columns,
        prompt_ids=(5, 6),
        completion_ids=tuple(ids),
    )


@pytest.mark.parametrize("tokens", [1, 6, 9, 1000])
def test_a_decoders_number_is_transformers_whatever_the_batch(tokens: int, reward_model: str):
    scores = load(reward_model, tokens_per_micro_batch=tokens).scores(TEXTS)
    assert scores == pytest.approx(by_transformers(reward_model, TEXTS), abs=1e-5)
    assert scores[0] == pytest.approx(scores[4], abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 4  # different texts have different scores


@pytest.mark.parametrize("tokens", [1, 1000])
def test_an_encoder_is_a_reward_model_too(tokens: int, random_model: str, tmp_path: Path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 200,
    }
    path = save(tmp_path, BertForSequenceClassification(BertConfig(num_labels=1, **sizes)), random_model)
    assert load(path, tokens_per_micro_batch=tokens).scores(TEXTS) == pytest.approx(
        by_transformers(path, TEXTS), abs=1e-5
    )


def test_it_reads_the_policys_own_tokens_to_the_end_of_the_text(reward_model: str):
    model = load(reward_model)
    row = inputs("95", "59", ids=[(9, 1), (10,)])
    assert model([(row, 0), (row, 1)]) == pytest.approx(model.scores([(5, 6, 9, 1), (5, 6, 10)]), abs=1e-5)
    # a text that is too long loses its beginning
    assert load(reward_model, max_tokens=2)([(row, 0)]) == pytest.approx(model.scores([(9, 1)]), abs=1e-5)


def test_it_reads_a_conversation_in_its_own_template(reward_model: str):
    # the tiny model's template: <user>question<assistant>answer<eos>
    tokenizer: Any = AutoTokenizer.from_pretrained(reward_model)
    expected = tuple(tokenizer("<user>37+58=<assistant>95<eos>", add_special_tokens=False)["input_ids"])
    model = load(reward_model, prompt_column="question")
    messages = [{"role": "user", "content": "37+58="}]
    rows = [(inputs("95", question="37+58="), 0), (inputs("95", question=messages), 0)]
    assert model(rows) == pytest.approx(model.scores([expected, expected]), abs=1e-5)
    with pytest.raises(
        UserError, match=r"column 'question' must hold text or messages, got None; there are: answer"
    ):
        model([(inputs("95", answer="95"), 0)])


def test_on_half_precision_weights_the_head_stays_float32(reward_model: str):
    exact, rounded = (
        load(reward_model, precision=precision).scores(TEXTS) for precision in ("float32", "bfloat16")
    )
    assert rounded == pytest.approx(exact, abs=0.05) and rounded != pytest.approx(exact, abs=1e-7)


def test_what_is_no_reward_model_is_refused(random_model: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"has no score.weight: it is a language model"):
        load(random_model)
    model = AutoModelForSequenceClassification.from_pretrained(random_model, num_labels=3)
    with pytest.raises(UserError, match="has 3 outputs; a reward model has 1"):
        load(save(tmp_path / "three", model, random_model))
    model_path = save(tmp_path / "one", load_reward_model(random_model, None, "auto"), random_model)
    (tmp_path / "one" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template for prompt_column question"):
        load(model_path, prompt_column="question")
