"""Packed rows that share prompts under flex_attention: who attends to whom, and the same log-probs as rows
of their own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Qwen2Config, Qwen2ForCausalLM

from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.errors import UserError
from rltrain.learner.block_masks import BLOCK
from rltrain.learner.forward import PolicyForward, sharing_layout
from rltrain.learner.micro_batches import row_micro_batches, shares_prompts
from rltrain.learner.packing import build
from rltrain.learner.shared_prompt import build_packed_lines, build_shared
from rltrain.learner.trained_model import TrainedModel
from rltrain.types.policy import TokenRows

# two prompts, of two and of one block and a half, with completions that end inside of blocks
LENGTHS = ((256, (70, 1, 300)), (190, (130, 5)))


def make_rows() -> TokenRows:
    generator = np.random.default_rng(0)
    prompts, completions = [], []
    for prompt, lengths in LENGTHS:
        ids = tuple(generator.integers(3, 60, prompt).tolist())
        for length in lengths:
            prompts.append(ids)
            completions.append(tuple(generator.integers(3, 60, length).tolist()))
    return TokenRows(tuple(prompts), tuple(completions))


ROWS = make_rows()
LINES = [[0, 1, 2], [3, 4]]


def dense(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """((S, S) bool who attends by the rule, (S, S) bool whether their blocks are read)."""
    size = mask.seq_lengths[0]
    places = torch.arange(size)
    attends = mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
    blocks = mask.to_dense()[0, 0].bool()
    read = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:size, :size]
    return attends, read


def test_a_position_attends_to_its_prompt_and_itself_and_no_block_is_read_in_vain() -> None:
    batch = build_packed_lines(ROWS, LINES)
    assert isinstance(batch.attention_mask, BlockMask) and batch.input_ids.shape[0] == 1
    attends, read = dense(batch.attention_mask)
    # the dense masks of the two lines, one after the other
    expected = torch.zeros_like(attends)
    start = 0
    for line in LINES:
        mask = build_shared(ROWS, [line]).attention_mask
        assert isinstance(mask, Tensor)
        size = mask.shape[-1]
        expected[start : start + size, start : start + size] = mask[0, 0]
        start += size
    assert torch.equal(attends, expected)
    assert not (attends & ~read).any()
    count = -(-len(attends) // BLOCK)
    padded = torch.nn.functional.pad(expected, [0, count * BLOCK - start] * 2)
    needed = padded.unflatten(0, (count, BLOCK)).unflatten(2, (count, BLOCK)).any(3).any(1)
    assert torch.equal(batch.attention_mask.to_dense()[0, 0].bool(), needed)
    assert 0.2 < float(needed.float().mean()) < 0.5


def test_rows_of_a_prompt_share_it_in_the_layout_of_the_models_kernel() -> None:
    config = Qwen2Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    layouts = {}
    for kernel in ("sdpa", "flex_attention", "eager"):
        config._attn_implementation = kernel
        with torch.device("meta"):
            layouts[kernel] = sharing_layout(Qwen2ForCausalLM(config))
    assert layouts == {"sdpa": "padded", "flex_attention": "packed", "eager": None}

    settings = SimpleNamespace(share_prompt="auto", tokens_per_micro_batch=2000)
    model: Any = SimpleNamespace(
        settings=settings,
        layout="packed",
        unwrapped_model=SimpleNamespace(shares_prompts="packed"),
        model=SimpleNamespace(config=SimpleNamespace(hidden_size=32)),
        device=torch.device("cpu"),
        world_size=1,
        rank=0,
    )
    assert shares_prompts(model)
    [batch] = row_micro_batches(model, ROWS, torch.arange(len(ROWS)), share=True)
    assert isinstance(batch.attention_mask, BlockMask)
    read = sum(prompt + sum(length - 1 for length in lengths) for prompt, lengths in LENGTHS)
    assert batch.input_ids.shape == (1, read)
    [row_alone] = row_micro_batches(model, ROWS.rows(torch.tensor([0, 3])), torch.arange(2), share=True)
    assert row_alone.attention_mask is None  # a row of its own needs no mask


def test_a_learner_on_a_cpu_refuses_it_before_a_model_is_loaded() -> None:
    settings = LearnerCore(optimizer=Optimizer(lr=0.1))
    model = Model(path="nobody/nothing", attention="flex_attention")
    with pytest.raises(UserError, match="gradient PyTorch computes on GPUs only"):
        TrainedModel(model, settings, total_updates=1, seed=0)


@pytest.mark.slow
def test_log_probs_are_those_of_rows_of_their_own(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    plain, flex = (
        PolicyForward(Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation=kernel))
        for kernel in ("sdpa", "flex_attention")
    )
    order = [4, 0, 2, 3, 1]
    with torch.no_grad():
        expected, shared = (
            policy(batch, temperature=1.0, wants=frozenset({"logp"}), chunk=64)["logp"]
            for policy, batch in (
                (plain, build(ROWS, order, layout="padded")),
                (flex, build_packed_lines(ROWS, LINES, order=order)),
            )
        )
    torch.testing.assert_close(shared, expected, rtol=0, atol=2e-5)
    assert float(expected.std()) > 0.1
    with pytest.raises(ValueError, match="cannot share prompts"):
        plain(build_packed_lines(ROWS, LINES), temperature=1.0, wants=frozenset({"logp"}), chunk=64)
