"""The head compared with the naive computation and with finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rltrain.learner import head
from rltrain.learner.head import STATISTICS, token_statistics
from support.tensor_sizes import LargestTensor


def make(
    tokens: int = 23, width: int = 6, vocab: int = 17, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width)
    weight = torch.randn(vocab, width)
    bias = torch.randn(vocab)
    targets = torch.randint(vocab, (tokens,))
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return hidden, weight, bias, targets


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> dict[str, Tensor]:
    """The definitions, on all logits at once."""
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logp = (logits / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return {"logp": logp.gather(1, targets[:, None]).squeeze(1), "entropy": entropy}


@pytest.mark.parametrize(
    "wants",
    [
        "logp",
        "entropy_grad",
        "clamped_entropy:0.3",
        "collision",
        "logp entropy_grad clamped_entropy:0.3 collision",
    ],
)
def test_every_gradient_is_the_finite_difference(wants: str) -> None:
    # gradcheck, float64, 23 tokens in chunks of 5 (the last of 3), temperature 0.7, with respect to hidden,
    # weight and bias.
    hidden, weight, bias, targets = make()

    def statistics(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        output = token_statistics(
            hidden, weight, targets, temperature=0.7, wants=frozenset(wants.split()), chunk=5, bias=bias
        )
        return tuple(output.values())

    assert torch.autograd.gradcheck(statistics, (hidden, weight, bias))


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    chunk: int, temperature: float, with_bias: bool
) -> None:
    hidden, weight, bias, targets = make()
    used_bias = bias if with_bias else None
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    # Different weights on every token and statistic, so that no two errors can cancel.
    g = torch.linspace(-1, 1, 23, dtype=torch.float64)
    g_entropy = torch.linspace(2, -1, 23, dtype=torch.float64)
    results = []
    for output in (
        token_statistics(
            hidden,
            weight,
            targets,
            temperature=temperature,
            wants=frozenset({"logp", "entropy_grad"}),
            chunk=chunk,
            bias=used_bias,
        ),
        naive(hidden, weight, used_bias, targets, temperature),
    ):
        loss = (g * output["logp"]).sum() + (g_entropy * output["entropy"]).sum()
        results.append((output["logp"], output["entropy"], *torch.autograd.grad(loss, inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_tiles_of_one_row_give_the_same_as_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = make()

    def gradients() -> tuple[Tensor, ...]:
        output = token_statistics(
            hidden,
            weight,
            targets,
            temperature=0.7,
            wants=frozenset({"logp", "entropy_grad", "collision"}),
            chunk=8,
        )
        return torch.autograd.grad(sum(value.square().sum() for value in output.values()), (hidden, weight))

    expected = gradients()
    monkeypatch.setitem(head._TILE_ELEMENTS, "cpu", 1)
    torch.testing.assert_close(gradients(), expected, rtol=1e-12, atol=1e-12)


def test_uniform_logits_give_log_v() -> None:
    # Equal logits over 8 tokens: every log-prob is -ln 8, the entropy ln 8, two draws agree with 1/8, and
    # half of the tokens (clamped at 0.5) have entropy ln 4.
    wants = frozenset({"logp", "entropy", "collision", "clamped_entropy:0.5"})
    output = token_statistics(
        torch.zeros(3, 2), torch.randn(8, 2), torch.tensor([0, 5, 7]), temperature=1.0, wants=wants, chunk=2
    )
    expected = {
        "logp": -math.log(8),
        "entropy": math.log(8),
        "collision": 1 / 8,
        "clamped_entropy:0.5": math.log(4),
    }
    for name, value in expected.items():
        torch.testing.assert_close(output[name], torch.full((3,), value))


def test_clamping_nothing_is_the_entropy() -> None:
    hidden, weight, _, targets = make()
    output = token_statistics(
        hidden, weight, targets, temperature=0.7, wants=frozenset({"entropy", "clamped_entropy:0"}), chunk=4
    )
    torch.testing.assert_close(output["clamped_entropy:0"], output["entropy"])


def test_huge_logits_stay_finite() -> None:
    # Logits 0 and 1e4 at temperature 0.1: p is one-hot, so log-probs are 0 and -1e5 and the entropy is 0;
    # exp(1e5) overflows.
    weight = torch.tensor([[0.0], [1e4]])
    output = token_statistics(
        torch.ones(2, 1),
        weight,
        torch.tensor([1, 0]),
        temperature=0.1,
        wants=frozenset({"logp", "entropy"}),
        chunk=2,
    )
    torch.testing.assert_close(output["logp"], torch.tensor([0.0, -1e5]))
    torch.testing.assert_close(output["entropy"], torch.zeros(2))


def test_entropy_carries_a_gradient_only_when_asked() -> None:
    hidden, weight, _, targets = make()
    ask = {"temperature": 1.0, "chunk": 8}
    detached = token_statistics(hidden, weight, targets, wants=frozenset({"logp", "entropy"}), **ask)  # type: ignore[arg-type]
    assert detached["logp"].requires_grad and not detached["entropy"].requires_grad
    both = token_statistics(
        hidden, weight, targets, wants=frozenset({"logp", "entropy", "entropy_grad"}), **ask
    )  # type: ignore[arg-type]
    assert both["entropy"].requires_grad and set(both) == {"logp", "entropy"}


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_the_same_one() -> None:
    hidden, weight, _, targets = make()
    ask = {"temperature": 1.0, "wants": frozenset({"logp"}), "chunk": 8}
    (trained,) = torch.autograd.grad(token_statistics(hidden, weight, targets, **ask)["logp"].sum(), hidden)  # type: ignore[arg-type]
    frozen = weight.detach()
    token_statistics(hidden, frozen, targets, **ask)["logp"].sum().backward()  # type: ignore[arg-type]
    assert frozen.grad is None
    torch.testing.assert_close(hidden.grad, trained)


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, _, targets = make()
    with torch.no_grad():
        output = token_statistics(
            hidden, weight, targets, temperature=1.0, wants=frozenset({"logp"}), chunk=8
        )
    assert output["logp"].grad_fn is None


def test_only_chunks_of_logits_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest tensor made in forward and backward is the weight's gradient or one chunk of logits: 8
    # tokens x V = 17, never 23 x 17.
    hidden, weight, _, targets = make(width=3)
    monkeypatch.setitem(head._TILE_ELEMENTS, "cpu", 17)
    with LargestTensor() as largest:
        output = token_statistics(
            hidden,
            weight,
            targets,
            temperature=1.0,
            wants=frozenset({"logp", "entropy_grad", "collision"}),
            chunk=8,
        )
        sum(value.sum() for value in output.values()).backward()
    assert largest.entries == 8 * 17


def test_no_tokens_give_zero_gradients() -> None:
    # A rank with an empty micro-batch: nothing to score, but both inputs get a gradient, so that collectives
    # run.
    hidden, weight, bias, _ = make()
    none = torch.zeros(0, dtype=torch.int64)
    output = token_statistics(
        hidden[:0],
        weight,
        none,
        temperature=1.0,
        wants=frozenset({"logp", "entropy_grad"}),
        chunk=8,
        bias=bias,
    )
    (output["logp"].sum() + output["entropy"].sum()).backward()
    for tensor in (hidden, weight, bias):
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor))


def test_bfloat16_statistics_are_float32_and_close() -> None:
    # bf16 keeps 8 bits: logits of size about 2 are rounded by at most 2^-8 x 2 = 0.8 %, twice (products and
    # storage).
    hidden, weight, _, targets = make(dtype=torch.bfloat16)
    wants = frozenset({"logp", "entropy_grad"})
    output = token_statistics(hidden, weight, targets, temperature=1.0, wants=wants, chunk=5)
    exact = naive(hidden.double(), weight.double(), None, targets, 1.0)
    grads = torch.autograd.grad(output["logp"].sum() + output["entropy"].sum(), (hidden, weight))
    expected = torch.autograd.grad(exact["logp"].sum() + exact["entropy"].sum(), (hidden, weight))
    for name in ("logp", "entropy"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name].double(), exact[name], rtol=0.02, atol=0.02)
    for gradient, expected_gradient in zip(grads, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=0.05, atol=0.05)


def test_fp32_head_has_no_rounding_of_its_own() -> None:
    # bf16 inputs, products in float32: as exact as float32 arithmetic on the same numbers.
    hidden, weight, _, targets = make(dtype=torch.bfloat16)
    output = token_statistics(
        hidden, weight, targets, temperature=0.7, wants=frozenset({"logp"}), chunk=5, fp32_head=True
    )
    torch.testing.assert_close(
        output["logp"].double(),
        naive(hidden.double(), weight.double(), None, targets, 0.7)["logp"],
        rtol=1e-5,
        atol=1e-5,
    )


def test_autocast_multiplies_in_its_dtype_and_sums_weight_gradients_in_float32() -> None:
    # Under bf16 autocast with float32 weights: log-probs differ from float32 by bf16 rounding (not 0, below
    # 3 %). All 4,096 tokens are equal, so the weight's gradient is 4,096 times one token's. Summed in bf16 it
    # would stop growing after about 256 terms.
    torch.manual_seed(0)
    hidden = torch.randn(1, 6).expand(4096, 6)
    weight = torch.randn(17, 6, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.int64)
    ask = {"temperature": 1.0, "wants": frozenset({"logp"}), "chunk": 4}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = token_statistics(hidden, weight, targets, **ask)["logp"]  # type: ignore[arg-type]
    exact = naive(hidden, weight, None, targets, 1.0)["logp"]
    assert logp.dtype == torch.float32
    assert 0 < (logp - exact).abs().max() < 0.03
    (gradient,) = torch.autograd.grad(logp.sum(), weight)
    (expected,) = torch.autograd.grad(exact.sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_unknown_statistics_and_bad_arguments_are_refused() -> None:
    hidden, weight, _, targets = make()
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        token_statistics(hidden, weight, targets, temperature=1.0, wants=frozenset({"entropi"}), chunk=8)
    with pytest.raises(ValueError, match="temperature is 0"):
        token_statistics(hidden, weight, targets, temperature=0.0, wants=frozenset({"logp"}), chunk=8)
    with pytest.raises(ValueError, match=r"targets \(22,\)"):
        token_statistics(hidden, weight, targets[1:], temperature=1.0, wants=frozenset({"logp"}), chunk=8)


def test_a_new_statistic_is_a_function_of_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Registered by name, differentiated by itself: the log-prob of token 3 is what its own target gives.
    monkeypatch.setitem(STATISTICS, "third", lambda logp, targets: logp[:, 3])
    hidden, weight, _, targets = make()
    output = token_statistics(
        hidden,
        weight,
        torch.full_like(targets, 3),
        temperature=0.7,
        wants=frozenset({"third", "logp"}),
        chunk=8,
    )
    torch.testing.assert_close(output["third"], output["logp"])
    expected, gradient = (
        torch.autograd.grad(output[name].sum(), weight, retain_graph=True)[0] for name in ("logp", "third")
    )
    torch.testing.assert_close(gradient, expected)
