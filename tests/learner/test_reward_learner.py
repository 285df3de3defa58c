"""A reward model with a scalar head, compared with transformers' forward pass, autograd and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.errors import UserError
from rltrain.learner.preference_learner import PreferenceLearner, lengths_of, pair_rows
from rltrain.learner.reward_learner import REWARDS, load_reward_model, name_pad_token
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.types.policy import TokenRows
from rltrain.types.preference import CompletionFacts, LabelBatch, PairBatch, RewardPairs

PROMPTS = ((5, 6, 7), (8, 9), (5, 9, 10, 11))
CHOSEN = ((12, 13, 2), (14, 2), (15, 16, 17, 18, 2))
REJECTED = ((12, 2), (19, 20, 21, 2), (22, 2))
ROWS = pair_rows(PROMPTS, CHOSEN, REJECTED)


def learner_of(path: str, **settings: Any) -> PreferenceLearner:
    core = LearnerCore(optimizer=Optimizer(lr=1e-2, max_grad_norm=1e9), **settings)
    return PreferenceLearner(Model(path=path), core, total_updates=10, seed=0, scoring=REWARDS)


def transformers_rewards(model: Any, rows: TokenRows) -> torch.Tensor:
    """(R,) by transformers' forward, one row at a time."""
    texts = [prompt + completion for prompt, completion in zip(rows.prompts, rows.completions, strict=True)]
    return torch.cat([model(torch.tensor([text])).logits[:, 0] for text in texts])


def copy_of(learner: PreferenceLearner, path: str) -> Any:
    model = load_reward_model(path, None, "auto")
    model.load_state_dict(dict(learner.model_weights()))
    return model


@pytest.mark.parametrize("loss", ["bradley_terry", "orm"])
@pytest.mark.parametrize("settings", [{}, {"tokens_per_micro_batch": 16}, {"layout": "packed"}])
def test_an_update_is_what_plain_pytorch_computes(
    loss: str,
    settings: dict[str, Any],
    random_model: str,
    assert_stepped_like: Callable[[Any, Any, float], None],
) -> None:
    learner = learner_of(random_model, **settings)
    model = copy_of(learner, random_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    facts = CompletionFacts(lengths_of(ROWS))
    prompt = torch.tensor([0, 1, 2])
    rewards = transformers_rewards(model, ROWS)
    if loss == "orm":
        label = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        batch: Any = LabelBatch(facts, prompt.repeat(2), label)
        expected = binary_cross_entropy_with_logits(rewards, label)
    else:
        batch = PairBatch(facts.rows(torch.arange(3)), facts.rows(torch.arange(3, 6)), prompt)
        expected = -logsigmoid(rewards[:3] - rewards[3:]).mean()
    actual = learner.log_probs(ROWS, sides=1 if loss == "orm" else 2)
    assert actual.tolist() == pytest.approx(rewards.tolist(), abs=1e-5)
    expected.backward()
    optimizer.step()
    update = learner.update_examples(ROWS, batch, PreferenceObjective(PREFERENCE_LOSSES.bind(loss)))
    assert update.metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-5)
    assert_stepped_like(learner, model, 1e-2)


def test_a_new_head_depends_on_the_seed_and_a_trained_one_can_be_required(random_model: str) -> None:
    first, second = (dict(learner_of(random_model).weights())["score.weight"] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0
    with pytest.raises(UserError, match=r"has no score.weight: it is a language model"):
        load_reward_model(random_model, None, "auto", trained=True)


def test_a_pad_that_ends_texts_is_not_named(random_model: str) -> None:
    learner = learner_of(random_model)
    for pad, named in ((0, 0), (2, None), (None, None)):
        name_pad_token(learner.model, pad, (2, 3))
        assert learner.model.config.pad_token_id == named


def test_a_rank_without_rows_gives_nothing(random_model: str) -> None:
    pairs = learner_of(random_model).loss_inputs(torch.zeros(0), 2)
    assert isinstance(pairs, RewardPairs) and pairs.chosen.shape == pairs.rejected.shape == (0,)
