"""Drawing tokens: hand-worked distributions with exactly representable numbers."""

from __future__ import annotations

import math

import torch

from rltrain.rollout.engines.transformers.sampling import sample_tokens_


def draw(
    probabilities: list[float], uniforms: list[float], temperature: float = 1.0
) -> tuple[list[int], list[float]]:
    logits = torch.tensor(probabilities).log().expand(len(uniforms), -1).clone()
    tokens, logp = sample_tokens_(logits, torch.tensor(uniforms), temperature)
    return tokens.tolist(), logp.tolist()


def test_the_uniform_number_picks_the_token_whose_cumulative_share_holds_it() -> None:
    # shares 1/4, 0, 1/4, 1/2: [0, 1/4) is token 0, [1/4, 1/2) token 2, [1/2, 1) token 3; token 1 has no
    # interval
    tokens, logp = draw([0.25, 0.0, 0.25, 0.5], [0.0, 0.249, 0.25, 0.499, 0.5, 0.999])
    assert tokens == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logp, [math.log(0.25)] * 4 + [math.log(0.5)] * 2)


def test_a_uniform_number_rounded_up_to_one_stops_at_the_last_possible_token() -> None:
    # float32 rounds 1 - 1e-9 to 1; tokens 3.. have probability 0, in the same block of 256 and in later ones
    assert draw([0.5, 0.25, 0.25, 0.0, 0.0], [1.0])[0] == [2]
    assert draw([0.5, 0.5] + [0.0] * 998, [1.0])[0] == [1]
    assert draw([0.0] * 300 + [1.0] + [0.0] * 699, [0.0, 0.5, 1.0])[0] == [300, 300, 300]


def test_large_vocabularies_are_searched_block_by_block_without_a_seam() -> None:
    # V = 1000 equal shares: u = (k + 1/2) / 1000 is token k, across the blocks of 256 and the shorter last
    # one
    tokens, logp = draw([1e-3] * 1000, [(k + 0.5) / 1000 for k in range(1000)])
    assert tokens == list(range(1000))
    torch.testing.assert_close(logp, [math.log(1e-3)] * 1000, atol=2e-6, rtol=0)


def test_temperature_divides_the_logits() -> None:
    # p = (1/5, 4/5) at T = 1 is proportional to (1, 2) at T = 2
    tokens, logp = draw([0.2, 0.8], [0.3, 0.4], temperature=2.0)
    assert tokens == [0, 1]
    torch.testing.assert_close(logp, [math.log(1 / 3), math.log(2 / 3)])


def test_temperature_zero_is_the_largest_logit_with_its_logprob_at_temperature_one() -> None:
    tokens, logp = draw([0.25, 0.5, 0.25], [0.0], temperature=0.0)
    assert tokens == [1]
    torch.testing.assert_close(logp, [math.log(0.5)])


def test_logits_that_are_not_finite_give_logprobs_that_are_not_numbers() -> None:
    for bad in (float("nan"), float("inf")):
        _, logp = sample_tokens_(
            torch.tensor([[0.0, bad, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([0.5, 0.5]), 1.0
        )
        assert math.isnan(logp[0]) and not math.isnan(logp[1])


def test_other_rows_do_not_change_a_draw() -> None:
    logits, uniform = torch.randn(64, 700, generator=torch.Generator().manual_seed(0)), torch.rand(64)
    together = sample_tokens_(logits.clone(), uniform, 1.0)
    for row in range(64):
        separate = sample_tokens_(logits[row : row + 1].clone(), uniform[row : row + 1], 1.0)
        assert separate[0][0] == together[0][row] and separate[1][0] == together[1][row]
