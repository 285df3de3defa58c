"""Statistics with arguments: the entropy at a temperature other than that of sampling, and sums of powers
with one power per token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.learner import head
from rltrain.learner.head import token_statistics
from support.tensor_sizes import LargestTensor

TOKENS = 11
WIDTH = 4
VOCAB = 9
POWER = torch.linspace(0.0, 1.0, TOKENS, dtype=torch.float64)


def make() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).double().requires_grad_()
    weight = torch.randn(VOCAB, WIDTH).double().requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (TOKENS,))


def compute(
    hidden: Tensor, weight: Tensor, targets: Tensor, *wants: str, temperature: float = 0.7, **more: object
) -> dict[str, Tensor]:
    ask = {
        "temperature": temperature,
        "wants": frozenset(wants),
        "chunk": 3,
        "arguments": {"power": POWER},
    } | more
    return token_statistics(hidden, weight, targets, **ask)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["entropy:0.4", "log_mass:0.5", "log_mass:power"])
def test_every_gradient_is_the_finite_difference(name: str) -> None:
    hidden, weight, targets = make()
    assert torch.autograd.gradcheck(lambda h, w: compute(h, w, targets, name, "logp")[name], (hidden, weight))


@pytest.mark.parametrize("temperature", [0.5, 0.7, 2.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
def test_the_entropy_at_a_temperature_is_of_the_models_logits_whatever_they_are_sampled_at(
    temperature: float, logit_scale: float
) -> None:
    hidden, weight, targets = make()
    actual = compute(
        hidden, weight, targets, "entropy:0.5", temperature=temperature, logit_scale=logit_scale
    )["entropy:0.5"]
    logp = (logit_scale * hidden @ weight.t() / 0.5).log_softmax(-1)
    assert_close(actual, -(logp.exp() * logp).sum(-1))


def test_the_entropy_at_the_sampling_temperature_is_the_entropy() -> None:
    hidden, weight, targets = make()
    both = compute(hidden, weight, targets, "entropy:0.7", "entropy_grad")
    assert_close(both["entropy:0.7"], both["entropy"])
    slopes = [
        torch.autograd.grad(both[name].sum(), weight, retain_graph=True)[0]
        for name in ("entropy:0.7", "entropy")
    ]
    assert_close(*slopes)


def test_each_token_has_its_own_power_in_every_chunk_and_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    # power 0: ln V; power 1: ln 1; in between ln sum p ** power, 11 tokens in chunks of 3 and tiles of one
    # row
    monkeypatch.setitem(head._TILE_ELEMENTS, "cpu", 1)
    hidden, weight, targets = make()
    actual = compute(hidden, weight, targets, "log_mass:power")["log_mass:power"]
    logp = (hidden @ weight.t() / 0.7).log_softmax(-1)
    assert_close(actual, (POWER[:, None] * logp).exp().sum(-1).log())
    assert_close(actual[0].item(), torch.tensor(float(VOCAB)).log().item())
    assert abs(actual[-1].item()) < 1e-12


def test_a_scale_of_the_logits_is_a_temperature() -> None:
    hidden, weight, targets = make()
    scaled = compute(hidden, weight, targets, "logp", temperature=0.7, logit_scale=0.5)["logp"]
    assert_close(scaled, compute(hidden, weight, targets, "logp", temperature=1.4)["logp"])


def test_only_chunks_of_logits_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forward and backward never make a tensor of 11 x 9: a chunk of logits is 3 x 9, the weight's gradient 9
    # x 4.
    hidden, weight, targets = make()
    monkeypatch.setitem(head._TILE_ELEMENTS, "cpu", VOCAB)
    with LargestTensor() as largest:
        sum(
            value.sum()
            for value in compute(hidden, weight, targets, "entropy:0.5", "log_mass:power").values()
        ).backward()
    assert largest.entries == 5 * TOKENS  # three numbers for each token, and the two requested ones


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("entropy:0", "no token statistic is called 'entropy:0'"),
        ("entropy:hot", "'entropy:hot'"),
        ("log_mass:pow", "reads 'pow', a number per token"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute(*make(), name)
