"""The policy's forward against ``log_softmax(model(input_ids).logits / T)``, one row at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rltrain.learner.forward import PACKABLE_MODELS, PolicyForward, head_scales, resolve_layout
from rltrain.learner.packing import MicroBatch, build
from rltrain.learner.shared_prompt import build_shared
from rltrain.types.policy import TokenRows

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WANTS = frozenset({"logp", "entropy_grad"})
LAYOUTS = [("padded", "right"), ("padded", "left"), ("packed", "right")]


def tiny(kind: str = "qwen2", dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **changes})).to(dtype)
    # A fresh head gives near-uniform probabilities, on which many errors would not show.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def some_rows(count: int = 7) -> TokenRows:
    """Prompts of 1 to 6 tokens, completions of 0 to 9."""
    rng = random.Random(1)

    def tokens(low: int, high: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rng.randrange(50) for _ in range(rng.randint(low, high))) for _ in range(count))

    return TokenRows(prompts=tokens(1, 6), completions=tokens(0, 9))


def oracle(model: nn.Module, rows: TokenRows, temperature: float) -> dict[str, Tensor]:
    """(R, T) from the model's own logits, each row by itself and unpadded."""
    width = max(map(len, rows.completions))
    logps = []
    entropies = []
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        pad = (0, width - len(completion))
        targets = torch.tensor(completion, dtype=torch.int64)[:, None]
        logps.append(nn.functional.pad(logp.gather(1, targets)[:, 0], pad))
        entropies.append(nn.functional.pad(-(logp.exp() * logp).sum(-1), pad))
    return {"logp": torch.stack(logps), "entropy": torch.stack(entropies)}


def weighted(statistics: dict[str, Tensor]) -> Tensor:
    """A loss with a different weight on every token and statistic."""
    shape = statistics["logp"].shape
    g = torch.linspace(-1, 1, shape.numel()).view(shape)
    return (g * statistics["logp"]).sum() + (g.flip(0) * statistics["entropy"]).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def rows_of_shared_prompts() -> TokenRows:
    """Nine rows of three prompts of 12, 7 and 12 tokens, completions of 0 to 5, in mixed order."""
    rng = random.Random(2)
    prompts = [tuple(rng.randrange(50) for _ in range(length)) for length in (12, 7, 12)]
    completions = tuple(
        tuple(rng.randrange(50) for _ in range(length)) for length in (5, 0, 1, 4, 2, 3, 5, 1, 2)
    )
    return TokenRows(tuple(prompts[row % 3] for row in range(9)), completions)


def shared(rows: TokenRows) -> MicroBatch:
    """``rows_of_shared_prompts`` in four lines, rows in their own order."""
    return build_shared(rows, [[0, 3], [1, 4, 7], [8, 2, 5], [6]], order=range(9))


def disagreeing(
    model: PreTrainedModel,
    *,
    rows: TokenRows | None = None,
    micro: MicroBatch | None = None,
    temperature: float = 0.7,
    atol: float = 1e-7,
    **layout: str,
) -> list[str]:
    """Names of the statistics and gradients that are not those of the model's own logits."""
    rows = rows or some_rows()
    expected = oracle(model, rows, temperature)
    expected_gradients = gradients(model, weighted(expected))
    micro = micro or build(rows, range(len(rows)), **layout)  # type: ignore[arg-type]
    actual = PolicyForward(model)(micro, temperature=temperature, wants=WANTS, chunk=4)
    actual_gradients = gradients(model, weighted(actual))  # Cohere normalises in float32
    assert actual.keys() == expected.keys() and actual_gradients.keys() == expected_gradients.keys()

    wrong = []
    for name, gradient in expected_gradients.items():
        if not torch.allclose(actual_gradients[name], gradient, rtol=1e-6, atol=atol):
            wrong.append(name)
    for name, value in expected.items():
        if not torch.allclose(actual[name], value, rtol=1e-7, atol=atol):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(("layout", "side"), LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_statistics_and_every_gradient_are_those_of_the_models_logits(
    layout: str, side: str, tied: bool
) -> None:
    assert not disagreeing(tiny(tie_word_embeddings=tied), layout=layout, padding_side=side)


def test_many_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rltrain.learner.forward._MIN_CHUNK_LOGITS", 0)
    assert not disagreeing(tiny(), layout="padded")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            "gpt2",
            {
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 64,
                "attn_pdrop": 0,
                "embd_pdrop": 0,
                "resid_pdrop": 0,
            },
        ),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("phi", {}),  # a head with a bias
        (
            "minicpm3",
            {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "num_key_value_heads": 4, "dim_model_base": 4},
        ),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_other_architectures_match_their_own_logits(kind: str, changes: dict[str, object]) -> None:
    assert not disagreeing(tiny(kind, **changes), layout="padded")


@pytest.mark.parametrize("kind", PACKABLE_MODELS)
def test_packed_sequences_do_not_see_each_other(kind: str) -> None:
    # Against each row alone, in float32 (expert layers have no float64 kernel). A sliding window of 4 is
    # shorter than most rows.
    changes = {"sliding_window": 4} if kind in ("mistral", "gemma3_text", "starcoder2") else {}
    experts = {
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    model = tiny(
        kind, torch.float32, **changes, **(experts if kind in ("mixtral", "qwen3_moe") else {})
    ).eval()
    rows = some_rows()
    with torch.no_grad():
        statistics = PolicyForward(model)(
            build(rows, range(7), layout="packed"), temperature=0.7, wants=frozenset({"logp"}), chunk=64
        )
        torch.testing.assert_close(statistics["logp"], oracle(model, rows, 0.7)["logp"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PACKABLE_MODELS)
def test_shared_prompts_give_each_row_its_log_probs_without_sharing(kind: str) -> None:
    experts = {
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    model = tiny(kind, torch.float32, **(experts if kind in ("mixtral", "qwen3_moe") else {})).eval()
    policy = PolicyForward(model)
    rows = rows_of_shared_prompts()
    micro = shared(rows)
    if policy.shares_prompts:
        with torch.no_grad():
            statistics = policy(micro, temperature=0.7, wants=frozenset({"logp"}), chunk=64)
            torch.testing.assert_close(
                statistics["logp"], oracle(model, rows, 0.7)["logp"], rtol=1e-4, atol=1e-4
            )
    else:
        assert getattr(model.config, "sliding_window", None) is not None
        with pytest.raises(ValueError, match="cannot share prompts"):
            policy(micro, temperature=0.7, wants=frozenset({"logp"}), chunk=64)


@pytest.mark.parametrize("tied", [False, True])
def test_shared_prompts_give_every_gradient(tied: bool) -> None:
    # RMSNorm works in float32: a rounding difference in the last digit of float64 can change one of float32.
    rows = rows_of_shared_prompts()
    assert not disagreeing(tiny(tie_word_embeddings=tied), rows=rows, micro=shared(rows), atol=2e-6)


def test_packing_is_refused_where_it_would_mix_sequences() -> None:
    # OPT takes restarting positions and attends across them; Lfm2's convolutions continue into the next
    # sequence.
    opt = PolicyForward(tiny("opt", word_embed_proj_dim=32, ffn_dim=48))
    with pytest.raises(ValueError, match=r"OPTForCausalLM.*set learner.layout: padded"):
        opt(build(some_rows(), [0, 1], layout="packed"), temperature=1.0, wants=frozenset({"logp"}), chunk=8)
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM.*set learner.layout: padded"):
        resolve_layout("packed", tiny("lfm2", layer_types=["conv", "full_attention"]))


def test_layout_auto_is_packed_only_where_the_kernel_supports_lengths() -> None:
    model = tiny()
    assert model.config._attn_implementation == "sdpa" and resolve_layout("auto", model) == "padded"
    assert resolve_layout("packed", model) == "packed"
    model.config._attn_implementation = "flash_attention_2"
    assert resolve_layout("auto", model) == "packed" and resolve_layout("padded", model) == "padded"


def test_scaled_heads_are_measured() -> None:
    assert head_scales(tiny("granite", logits_scaling=8.0)) == (1.0, pytest.approx(0.125))
    assert head_scales(tiny("cohere", logit_scale=0.25)) == (1.0, pytest.approx(0.25))
    assert head_scales(tiny()) == (1.0, 1.0)


@pytest.mark.parametrize("cap", [15.0, 30.0, 100.0])
def test_capped_logits_are_refused(cap: float) -> None:
    with pytest.raises(ValueError, match=rf"Gemma2ForCausalLM.*final_logit_softcapping is {cap}"):
        PolicyForward(tiny("gemma2", final_logit_softcapping=cap))


def test_a_bare_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="Qwen2Model is not one decoder with an output head"):
        PolicyForward(tiny().model)


def test_nothing_to_score_still_reaches_every_parameter() -> None:
    # An empty micro-batch: statistics of shape (0, 1), zero gradients for all, so that DDP's and FSDP's
    # reductions run.
    model = tiny()
    for layout in ("padded", "packed"):
        statistics = PolicyForward(model)(
            build(some_rows(), [], layout=layout), temperature=1.0, wants=WANTS, chunk=8
        )  # type: ignore[arg-type]
        assert statistics["logp"].shape == (0, 1)
        grads = gradients(model, statistics["logp"].sum() + statistics["entropy"].sum())
        assert set(grads) == {name for name, _ in model.named_parameters()}
        assert all(not grad.any() for grad in grads.values())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = tiny()
    policy = PolicyForward(model).train()
    micro = build(some_rows(), range(7), layout="padded")
    plain = gradients(model, weighted(policy(micro, temperature=0.7, wants=WANTS, chunk=8)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(
        gradients(model, weighted(policy(micro, temperature=0.7, wants=WANTS, chunk=8))), plain
    )


def test_hooks_of_the_head_run() -> None:
    # ZeRO-3 gathers a layer's weight in a hook before its forward: the head's hook must run although the
    # head's forward is replaced. Afterwards the head is a linear layer again.
    model = tiny()
    fired = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: fired.append(tuple(inputs[0].shape)))
    micro = build(some_rows(), [0], layout="padded")
    PolicyForward(model)(micro, temperature=1.0, wants=WANTS, chunk=8)
    assert fired == [(micro.targets.numel(), 32)]
    assert "forward" not in model.lm_head.__dict__
    assert model.lm_head(torch.zeros(1, 32, dtype=torch.float64)).shape == (1, 50)


def lora(model: PreTrainedModel, **changes: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj", "v_proj"], **changes})
    )
    return adapted.double()


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}])
def test_lora_matches_the_adapted_models_logits(changes: dict[str, object]) -> None:
    assert not disagreeing(lora(tiny(), **changes), layout="padded")  # type: ignore[arg-type]


def test_a_disabled_adapter_gives_the_reference() -> None:
    # The reference policy of a LoRA run: the same module with its adapters off, head included.
    base = tiny()
    rows = some_rows()
    expected = oracle(base, rows, 0.7)["logp"].detach()
    adapted = lora(base, modules_to_save=["lm_head"])
    adapted.base_model.model.lm_head.modules_to_save["default"].weight.data += 1.0
    policy = PolicyForward(adapted)
    with torch.no_grad(), adapted.disable_adapter():  # type: ignore[operator]
        statistics = policy(
            build(rows, range(7), layout="padded"), temperature=0.7, wants=frozenset({"logp"}), chunk=8
        )
    torch.testing.assert_close(statistics["logp"], expected)


def test_lora_on_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="remove lm_head from target_modules"):
        PolicyForward(lora(tiny(), target_modules=["q_proj", "lm_head"]))
