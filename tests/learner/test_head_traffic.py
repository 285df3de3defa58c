"""What the output head moves on a GPU, counted on meta tensors, and its compiled functions on a CPU."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from rltrain.learner import compiled_tiles, head
from rltrain.learner.head import clamped_entropy, entropy_of_largest, kth_largest, token_statistics
from support.scripts import script

traffic = script("head_traffic")
HIDDEN = 3584
VOCABULARY = 152064
TOKENS = 16384


@pytest.mark.parametrize("chunk", [256, 1024, 2048, 4096])
def test_bytes_and_kernels_of_the_eager_head_are_within_bounds(chunk: int) -> None:
    forward, backward = traffic.count_head(HIDDEN, VOCABULARY, TOKENS, chunk)
    chunks = TOKENS // chunk
    matrix = VOCABULARY * HIDDEN
    # bytes of the matrix: forward reads it per chunk (2); backward reads it twice (2 + 2) and reads and
    # writes its float32 gradient (4 + 4); the gradient starts as zeros (4) and becomes bfloat16 (4 + 2)
    assert forward.bytes <= 2 * chunks * matrix + 44 * TOKENS * VOCABULARY
    assert backward.bytes <= (12 * chunks + 10) * matrix + 45 * TOKENS * VOCABULARY
    tiles = -(-chunk // (head._TILE_ELEMENTS_ELSEWHERE // VOCABULARY)) * chunks
    assert forward.kernels + backward.kernels <= 28 * tiles + 8 * chunks + 20
    # four products of V H n multiplications, whatever the chunk is
    assert forward.flop + backward.flop == 4 * 2 * TOKENS * matrix


def test_larger_chunks_are_the_default_on_a_gpu_and_save_more_than_a_quarter_of_the_bytes() -> None:
    from rltrain.config.schema import LearnerCore, Optimizer

    learner = LearnerCore(optimizer=Optimizer(lr=1e-6))
    assert (learner.head_chunk_on("cpu"), learner.head_chunk_on("cuda")) == (256, 2048)
    assert learner.model_copy(update={"head_chunk": 64}).head_chunk_on("cuda") == 64
    small, large = (
        sum(part.bytes for part in traffic.count_head(HIDDEN, VOCABULARY, TOKENS, chunk))
        for chunk in (256, 2048)
    )
    assert large < 0.45 * small


def test_a_gradient_in_another_dtype_is_added_without_a_second_matrix() -> None:
    # where no kernel adds products of another dtype, as on CPUs: a slice is added in place, not written again
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(40, 64, generator=generator).bfloat16()
    hidden = torch.randn(40, 8, generator=generator).bfloat16()
    total = torch.ones(64, 8)
    assert not head.adds_products(torch.device("cpu"), torch.bfloat16, torch.float32)
    with traffic.Traffic() as count:
        head._add_product(total, gradient, hidden)
    torch.testing.assert_close(total, 1 + torch.mm(gradient.t(), hidden).float(), rtol=0, atol=0)
    assert set(count.by_name) == {"mm", "add_"}


def test_the_clamped_entropy_without_a_sort_is_that_of_the_largest_entries() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(9, 500, dtype=torch.float64)
    logits[0] = logits[0].round()  # ties
    logits[1] = 0.0  # only ties
    logits[2, 100:] = -torch.inf
    logp = logits.log_softmax(-1)
    for share in (0.0, 0.3, 0.7, 0.998):
        kept = 500 - int(share * 500)
        assert torch.equal(kth_largest(logp, kept), logp.topk(kept).values[:, -1])
        assert torch.equal(kth_largest(logp.float(), kept), logp.float().topk(kept).values[:, -1])
        largest = logp[3:].clone().requires_grad_()
        bisected = logp[3:].clone().requires_grad_()
        expected = clamped_entropy(largest, torch.zeros(6, dtype=torch.int64), share)
        actual = entropy_of_largest(bisected, kept)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        torch.autograd.backward([expected.sum(), actual.sum()])
        torch.testing.assert_close(bisected.grad, largest.grad, rtol=1e-10, atol=1e-12)
        values = entropy_of_largest(logp[:2], kept)
        torch.testing.assert_close(
            values,
            clamped_entropy(logp[:2], torch.zeros(2, dtype=torch.int64), share),
            rtol=1e-12,
            atol=1e-12,
        )
    assert entropy_of_largest(logp[2:3], 400).isfinite().all()


def statistics_and_gradients(chunk: int) -> list[Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(37, 16).bfloat16().requires_grad_()
    weight = torch.randn(3000, 16).bfloat16().requires_grad_()
    targets = torch.randint(3000, (37,))
    wants = frozenset({"logp", "entropy_grad"})
    values = token_statistics(hidden, weight, targets, temperature=0.7, wants=wants, chunk=chunk)
    loss = (values["logp"] * torch.linspace(-1, 1, 37)).sum() + 0.3 * values["entropy"].square().sum()
    return [values["logp"], values["entropy"], *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.slow
def test_compiled_tiles_give_the_references_numbers_in_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = statistics_and_gradients(8)
    monkeypatch.setattr(compiled_tiles, "_DEVICES", {"cpu"})
    assert compiled_tiles.compiles_on("cpu")
    actual = statistics_and_gradients(8)
    for name, value, reference in zip(("logp", "entropy", "hidden", "weight"), actual, expected, strict=True):
        rtol = 1e-5 if name in ("logp", "entropy") else 0.02  # gradients of the logits are bfloat16
        torch.testing.assert_close(value, reference, rtol=rtol, atol=rtol * float(reference.abs().mean()))

    passes = traffic.planned_passes()
    assert passes["forward"] <= 4.01  # bfloat16 logits, read for the maximum and for the sums
    assert passes["backward"] <= 4.01  # read and overwritten
    forward, backward = traffic.count_head(HIDDEN, VOCABULARY, TOKENS, 2048, compiled=True)
    assert (
        forward.bytes + backward.bytes < 0.16 * 676e9
    )  # 676 GB: the backward pass alone in chunks of 256, before
    assert forward.kernels + backward.kernels < 100


def test_where_nothing_compiles_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no compiler\non this machine")

    expected = statistics_and_gradients(8)
    monkeypatch.setattr(compiled_tiles, "_DEVICES", {"cpu"})
    monkeypatch.setattr(compiled_tiles, "softmax_numbers", fail)
    compiled_tiles.compiles_on.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            actual = statistics_and_gradients(8)
    finally:
        compiled_tiles.compiles_on.cache_clear()
    assert "runs uncompiled, since torch.compile fails here: no compiler" in caplog.text
    for value, reference in zip(actual, expected, strict=True):
        assert torch.equal(value, reference)


def test_memory_that_runs_out_is_no_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(compiled_tiles, "softmax_numbers", run_out)
    compiled_tiles.compiles_on.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        compiled_tiles.compiles_on("cpu")
    compiled_tiles.compiles_on.cache_clear()
