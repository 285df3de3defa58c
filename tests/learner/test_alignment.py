"""GAIN-RL's cosines compared with means over all pairs, and the hidden states from which they are
computed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rltrain.learner.alignment import last_mlp_inputs, pair_cosines
from rltrain.learner.forward import PolicyForward
from rltrain.learner.packing import build
from rltrain.types.policy import TokenRows

# the worked example: two tokens of prefix, two of question
STATES = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1.0, 0], [0.6, 0.8, 0]])


def test_the_worked_example() -> None:
    # C_intra: the one pair of question tokens, 0.8; C_inter: mean of 0, 0.6, 0.6, 0.96
    intra, inter = pair_cosines(STATES, prefix=2, suffix=0)
    assert_close(intra.item(), 0.8, rtol=1e-6, atol=0)
    assert_close(inter.item(), 0.54, rtol=1e-6, atol=0)
    assert_close(float(intra + 8 * inter), 5.12, rtol=1e-6, atol=0)


def test_sums_of_unit_vectors_are_the_means_over_all_pairs() -> None:
    unit = torch.nn.functional.normalize(
        torch.randn(11, 5, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    cosines = unit @ unit.t()
    question = slice(3, 9)  # prefix 3, suffix 2
    intra, inter = pair_cosines(unit, 3, 2)
    block = cosines[question, question]
    assert_close(intra, (block.sum() - block.trace()) / 30)
    assert_close(inter, cosines[question, :3].mean())


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (3, 0), (0, 4), (2, 1)])
def test_a_text_of_one_token_or_none_has_no_pairs(prefix: int, suffix: int) -> None:
    intra, inter = pair_cosines(STATES[: prefix + suffix + 1], prefix, suffix)
    assert intra.abs() < 1e-6 and inter.isfinite()


@pytest.fixture(scope="module")
def model(random_model: str) -> PolicyForward:
    return PolicyForward(AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)).eval()


PROMPTS = ((5, 6, 7, 8, 9, 10), (5, 6, 11, 9, 10), (5, 6, 12, 13, 14, 7, 9, 10))


def states_of(model: PolicyForward, tokens: tuple[int, ...]) -> Tensor:
    """(n, d) the input of the last layer's MLP for a single text."""
    inner = model.model
    with torch.no_grad(), last_mlp_inputs(inner) as mlp_inputs:  # type: ignore[arg-type]
        inner(input_ids=torch.tensor([tokens]), use_cache=False)
    return mlp_inputs[0][0]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_prompts_score_is_its_own_in_any_micro_batch(model: PolicyForward, layout: str) -> None:
    rows = TokenRows(PROMPTS, tuple(prompt[-1:] for prompt in PROMPTS))
    name = "alignment:2:2:8.0"
    micro_batch = build(rows, [0, 1, 2], layout=layout)  # type: ignore[arg-type]
    with torch.no_grad():
        scores = model(micro_batch, temperature=1.0, wants=frozenset({name, "logp"}), chunk=4)[name][:, 0]
    for prompt, score in zip(PROMPTS, scores, strict=True):
        unit = torch.nn.functional.normalize(states_of(model, prompt), dim=-1)
        intra, inter = pair_cosines(unit, 2, 2)
        assert_close(score, intra + 8 * inter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_rows_alignment_is_the_released_mean_over_prompt_and_completion(
    model: PolicyForward, layout: str
) -> None:
    # cosines on and below the diagonal and on the line above it; the completion's last token is not read
    rows = TokenRows(PROMPTS, ((20, 21, 22), (23,), (24, 25)))
    micro_batch = build(rows, [2, 0, 1], layout=layout)  # type: ignore[arg-type]
    with torch.no_grad():
        scores = model(micro_batch, temperature=1.0, wants=frozenset({"alignment"}), chunk=4)["alignment"]
    for place, row in enumerate((2, 0, 1)):
        tokens = rows.prompts[row] + rows.completions[row][:-1]
        unit = torch.nn.functional.normalize(states_of(model, tokens), dim=-1)
        cosines = unit @ unit.t()
        included = torch.ones_like(cosines).tril(1).bool()
        assert_close(scores[place, 0], cosines[included].mean(), rtol=1e-4, atol=1e-5)
        assert (scores[place, : len(rows.completions[row])] == scores[place, 0]).all()


def test_the_hook_leaves_nothing_behind(model: PolicyForward) -> None:
    with last_mlp_inputs(model.model) as mlp_inputs:  # type: ignore[arg-type]
        pass
    model.model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    assert mlp_inputs == []


def test_rescaling_a_tokens_state_changes_no_score() -> None:
    scaled = torch.nn.functional.normalize(STATES * torch.tensor([[2.0], [0.1], [7.0], [1.0]]), dim=-1)
    for score, expected in zip(pair_cosines(scaled, 2, 0), pair_cosines(STATES, 2, 0), strict=True):
        assert_close(score, expected)
