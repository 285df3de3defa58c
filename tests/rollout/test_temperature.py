"""HAPO's adaptive temperature in the sampler of the embedded engine, and the statistics it goes by."""

from __future__ import annotations

import math

import pytest
import torch

from rltrain.rollout.engines.transformers import sampling
from rltrain.rollout.engines.transformers.sampling import sample_tokens_
from rltrain.rollout.temperature import TemperatureController, entropy_of, token_temperatures
from rltrain.types.samples import AdaptiveTemperature, Sampling

BASE = Sampling(n=2, temperature=1.0, max_tokens=8, seed=0)
# The entropies of the paper's worked example: pivot 0.095310, sigma 0.382775, 1 / top 4.399137, 1 / bottom
# -0.552228.
ENTROPY = torch.tensor([[0.9, 0.7, 1.2], [1.1, 0.55, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def controller(variant: str, tau: float) -> TemperatureController:
    return TemperatureController(tau=tau, variant=variant, rho=0.8)  # type: ignore[arg-type]


def temperatures(variant: str, tau: float) -> torch.Tensor:
    adaptation = controller(variant, tau)
    adaptation.observe(ENTROPY, MASK)
    adaptive = adaptation.sampling(BASE).adaptive
    assert adaptive is not None
    return token_temperatures(ENTROPY, 1.0, adaptive)[MASK]


@pytest.mark.parametrize(
    ("variant", "tau", "expected"),
    [
        ("scaled", 0.05, [0.985525, 0.967396, 1.05, 1.0, 0.95]),
        ("released", 0.05, [1 + 0.05 * 0.289507, 1 + 0.05 * 0.652077, 1.05, 1.0, 1.05]),
        ("unscaled", 0.1, [0.947575, 0.881919, 1.022732, 1.0, 0.818915]),
    ],
)
def test_temperatures_are_the_worked_example_s(variant: str, tau: float, expected: list[float]) -> None:
    torch.testing.assert_close(temperatures(variant, tau), torch.tensor(expected), atol=2e-6, rtol=0)


def test_the_first_step_samples_at_the_base() -> None:
    assert controller("scaled", 0.05).sampling(BASE) is BASE


def test_tokens_beyond_the_last_step_s_range_are_held_at_its_ends() -> None:
    adaptation = controller("scaled", 0.05)
    adaptation.observe(ENTROPY, MASK)
    adaptive = adaptation.sampling(BASE).adaptive
    assert adaptive is not None
    torch.testing.assert_close(
        token_temperatures(torch.tensor([9.0, 0.0]), 0.7, adaptive), torch.tensor([0.7 * 1.05, 0.7 * 0.95])
    )


def test_the_unscaled_form_never_reaches_zero() -> None:
    # ln 1e-8 is 48.4 sigmas below the pivot: 1 - 0.1 x 48.4 < 0
    adaptation = controller("unscaled", 0.1)
    adaptation.observe(ENTROPY, MASK)
    adaptive = adaptation.sampling(BASE).adaptive
    assert adaptive is not None
    assert token_temperatures(torch.tensor([0.0]), 1.0, adaptive).item() == pytest.approx(0.1)


def test_state_comes_back_and_steps_without_news_keep_it() -> None:
    first, second = controller("scaled", 0.05), controller("scaled", 0.05)
    assert first.state_dict() == {}
    first.observe(ENTROPY, MASK)
    second.load_state_dict(first.state_dict())
    assert second.sampling(BASE) == first.sampling(BASE)
    first.observe(ENTROPY, torch.zeros_like(MASK))
    first.observe(torch.full_like(ENTROPY, math.nan), MASK)
    assert first.sampling(BASE) == second.sampling(BASE)
    second.load_state_dict({})
    assert second.sampling(BASE).adaptive is None


def test_entropy_leaves_out_impossible_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [math.log(3), 0.0, -torch.inf]])
    # ln 2; and -(3/4 ln 3/4 + 1/4 ln 1/4) = 0.562335
    torch.testing.assert_close(entropy_of(logits), torch.tensor([math.log(2), 0.562335]))


@pytest.mark.parametrize("base", [1.0, 0.7])
def test_tokens_are_drawn_at_their_own_temperature_and_reported_at_the_base(base: float) -> None:
    # Two rows, a certain and an uncertain one, at opposite ends of the range: T = base (1 -+ 0.5). 40,000
    # stratified draws of each have the distribution itself as frequencies, up to one draw per token.
    logits = torch.tensor([[2.0, 0.0, -1.0, -2.0], [0.3, 0.2, 0.1, 0.0]])
    entropy = entropy_of(logits / base)
    adaptive = AdaptiveTemperature(
        0.5, "scaled", pivot=entropy.log().mean().item(), sigma=1.0, top=0.01, bottom=-0.01
    )
    draws = 40_000
    uniform = ((torch.arange(draws) + 0.5) / draws).repeat(2)
    tokens, logp = sample_tokens_(logits.repeat_interleave(draws, 0), uniform, base, adaptive)
    for row, factor in enumerate((0.5, 1.5)):
        drawn = tokens[row * draws : (row + 1) * draws]
        share = torch.bincount(drawn, minlength=4) / draws
        torch.testing.assert_close(share, torch.softmax(logits[row] / (base * factor), -1), atol=1e-3, rtol=0)
        reported = torch.log_softmax(logits[row] / base, -1)[drawn]
        torch.testing.assert_close(logp[row * draws : (row + 1) * draws], reported)


@pytest.mark.parametrize("base", [0.3, 0.7, 1.0, 1.4])
def test_a_fifth_of_the_tokens_is_hot_whatever_the_base(base: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # rho 0.8: a fifth of the tokens lies above the pivot of the signal, which the learner measures at the
    # base temperature
    logits = (
        torch.randn(2000, 50, generator=torch.Generator().manual_seed(3))
        * torch.linspace(0.5, 6, 2000)[:, None]
    )
    adaptation = controller("scaled", 0.5)
    adaptation.observe(entropy_of(logits / base)[None], torch.ones(1, 2000, dtype=torch.bool))
    drawn_at: list[torch.Tensor] = []

    def noted(*arguments: object) -> torch.Tensor:
        drawn_at.append(token_temperatures(*arguments))  # type: ignore[arg-type]
        return drawn_at[-1]

    monkeypatch.setattr(sampling, "token_temperatures", noted)
    sample_tokens_(logits.clone(), torch.rand(2000), base, adaptation.sampling(BASE).adaptive)
    assert (drawn_at[0] > base).float().mean().item() == pytest.approx(0.2, abs=1e-3)


def test_tau_zero_draws_what_a_fixed_temperature_draws() -> None:
    logits, uniform = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)), torch.rand(64)
    adaptive = AdaptiveTemperature(0.0, "scaled", 0.0, 1.0, 1.0, -1.0)
    tokens, logp = sample_tokens_(logits.clone(), uniform, 0.8, adaptive)
    plain, expected = sample_tokens_(logits.clone(), uniform, 0.8)
    assert torch.equal(tokens, plain)
    torch.testing.assert_close(logp, expected)
