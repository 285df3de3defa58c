"""LoRA adapters in the learner: only they are trained, switched off they are the reference, and what is
written is what peft and transformers load.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.checkpoint.export import export_adapter
from rltrain.cli.soup import soup_command
from rltrain.config.schema import Adapter, LearnerCore, Model, Optimizer
from rltrain.errors import UserError
from rltrain.learner.adapter import linear_layers, merge_adapter_folder, target_paths
from rltrain.learner.adapter_off import AdapterOff
from rltrain.learner.frozen_models import frozen_or_adapter_off, load_frozen
from rltrain.learner.loading import load_causal_lm
from rltrain.learner.preference_learner import PreferenceLearner, lengths_of, pair_rows
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.needs import PAIRS
from rltrain.types.policy import TokenRows
from rltrain.types.preference import CompletionFacts, LabelBatch, PairBatch

N = 6
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")


def rows_of_pairs() -> TokenRows:
    g = torch.Generator().manual_seed(0)

    def draw() -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(torch.randint(5, 60, (4 + place,), generator=g).tolist()) for place in range(N))

    return pair_rows(draw(), draw(), draw())


def model_of(path: str, **adapter: Any) -> Model:
    return Model(path=path, adapter=Adapter(**{"rank": 4, "alpha": 8, **adapter}))


def learner_of(model: Model, **options: Any) -> PreferenceLearner:
    settings = LearnerCore(optimizer=Optimizer(lr=1e-2, max_grad_norm=1e9))
    return PreferenceLearner(model, settings, total_updates=10, seed=0, **options)


def train(learner: PreferenceLearner, updates: int, reference: Any, loss: str = "dpo") -> list[float]:
    rows = rows_of_pairs()
    objective = PreferenceObjective(PREFERENCE_LOSSES.bind(loss, {}))
    facts = facts_of(learner, rows, reference)
    halves = (slice(0, N), slice(N, None))
    chosen, rejected = (CompletionFacts(facts.length[half], ref_logp=ref_of(facts)[half]) for half in halves)
    others = None
    batch: PairBatch | LabelBatch = PairBatch(chosen, rejected, torch.arange(N))
    if PAIRS not in objective.loss.spec.traits:
        rows = TokenRows(rows.prompts[:N], rows.completions[:N])
        others = TokenRows(rows.prompts, (*rows.completions[1:], rows.completions[0]))
        mismatched = facts_of(learner, others, reference, sides=1)
        label = (torch.arange(N) % 2).float()
        batch = LabelBatch(chosen, torch.arange(N), label=label, mismatched=mismatched)
    return [
        learner.update_examples(rows, batch, objective, others).metrics["loss/total"] for _ in range(updates)
    ]


def facts_of(learner: PreferenceLearner, rows: TokenRows, reference: Any, sides: int = 2) -> CompletionFacts:
    return CompletionFacts(lengths_of(rows), ref_logp=learner.log_probs(rows, sides=sides, frozen=reference))


def ref_of(facts: CompletionFacts) -> Tensor:
    assert facts.ref_logp is not None
    return facts.ref_logp


def write(learner: PreferenceLearner, folder: Path, path: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(path)
    adapter = learner.trained.adapter
    assert adapter is not None
    config = learner.trained.adapter_config()
    weights = learner.adapter_weights()
    return export_adapter(folder, tokenizer, "card", config, weights, storage=adapter.settings.quantize)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


@pytest.fixture
def trained(random_model: str) -> PreferenceLearner:
    learner = learner_of(model_of(random_model, rslora=True))
    train(learner, 3, AdapterOff(learner.trained))
    return learner


def test_only_the_adapter_is_trained_and_saved_as_state(
    random_model: str, trained: PreferenceLearner
) -> None:
    base = load_causal_lm(random_model, None, "auto").state_dict()
    for name, weight in trained.trained.base_model_weights():
        assert torch.equal(weight, base[name]), name
    names = {name for name, weight in trained.model.named_parameters() if weight.requires_grad}
    assert names and all(".lora_" in name for name in names)
    assert {name.rpartition("/")[0] for name, _ in trained.optimizer_state()} == names
    moved = {name for name, weight in trained.model_weights() if not torch.equal(weight, base[name])}
    assert moved == {f"{path}.weight" for path in linear_layers_of(base)}


def linear_layers_of(base: dict[str, Tensor]) -> set[str]:
    return {name.removesuffix(".weight") for name in base if name.endswith("_proj.weight")}


@pytest.mark.parametrize("loss", ["dpo", "h_dpo", "kto", "implicit_prm_ce"])
def test_the_adapter_switched_off_is_a_second_model(
    random_model: str, trained: PreferenceLearner, loss: str
) -> None:
    rows = rows_of_pairs()
    model = model_of(random_model)
    off = frozen_or_adapter_off(None, model, trained.trained)
    assert isinstance(off, AdapterOff)
    second = load_frozen(None, model, trained.trained)
    expected = trained.token_log_probs(rows, second)
    assert torch.equal(trained.token_log_probs(rows, off), expected)
    assert (trained.token_log_probs(rows) - expected).abs().max() > 1e-3
    assert all(weight.requires_grad for layer in layers_of(trained) for weight in layer.weights)

    by_off = learner_of(model)
    by_second = learner_of(model)
    reference = AdapterOff(by_off.trained)
    assert train(by_off, 3, reference, loss) == train(by_second, 3, second, loss)


def layers_of(learner: PreferenceLearner) -> list[Any]:
    assert learner.trained.adapter is not None
    return list(learner.trained.adapter.layers.values())


def test_peft_and_transformers_load_the_adapter_and_compute_the_same(
    random_model: str, trained: PreferenceLearner, tmp_path: Path
) -> None:
    folder = write(trained, tmp_path / "adapter", random_model)
    expected = logits(trained.model)
    base = AutoModelForCausalLM.from_pretrained(random_model)
    by_peft = PeftModel.from_pretrained(base, str(folder))
    assert (logits(by_peft) - expected).abs().max() < 1e-5
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(by_transformers) - expected).abs().max() < 1e-5
    assert (logits(load_causal_lm(str(folder), None, "auto")) - expected).abs().max() < 1e-5
    merged = by_peft.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    for name, weight in trained.model_weights():
        assert (weight - merged[name]).abs().max() < 1e-6, name


def test_training_continues_from_an_adapter_bit_for_bit(
    random_model: str, trained: PreferenceLearner, tmp_path: Path
) -> None:
    model = model_of(random_model, rslora=True)
    folder = write(trained, tmp_path / "adapter", random_model)
    state = {name: tensor.clone() for name, tensor in trained.optimizer_state()}
    values = trained.state()
    continued = learner_of(model, adapter_from=folder)
    continued.restore(state, values)
    for learner in (trained, continued):
        train(learner, 2, AdapterOff(learner.trained))
    expected = dict(trained.adapter_weights())
    assert all(torch.equal(weight, expected[name]) for name, weight in continued.adapter_weights())


def test_another_adapter_is_refused_before_training(
    random_model: str, trained: PreferenceLearner, tmp_path: Path
) -> None:
    folder = write(trained, tmp_path / "adapter", random_model)
    with pytest.raises(UserError, match=r"is \(4, .*\) there and \(8, .*set model.adapter"):
        learner_of(model_of(random_model, rank=8), adapter_from=folder)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not belong to Qwen2ForCausalLM"):
        merge_adapter_folder(load_causal_lm(random_model, None, "auto"), folder)


# which layers -----------------------------------------------------------------------------------------------


def test_targets(random_model: str) -> None:
    model = load_causal_lm(random_model, None, "auto")
    every = set(linear_layers(model))
    assert set(target_paths(model, Adapter())) == every and not any("head" in path for path in every)
    attention = target_paths(model, Adapter(targets="attention"))
    assert set(attention) == {path for path in every if "self_attn" in path}
    assert {path.rpartition(".")[2] for path in target_paths(model, Adapter(targets=("q_proj",)))} == {
        "q_proj"
    }
    with pytest.raises(UserError, match=r"names 'query', which is no linear layer.*q_proj"):
        target_paths(model, Adapter(targets=("q_proj", "query")))


def test_kappatune_takes_the_matrices_with_the_smallest_condition_numbers(random_model: str) -> None:
    model = load_causal_lm(random_model, None, "auto")
    numbers = {
        path: float(torch.linalg.cond(layer.weight.detach())) for path, layer in linear_layers(model).items()
    }
    count = int(len(numbers) * 0.4)
    expected = set(sorted(numbers, key=lambda path: numbers[path])[:count])
    assert set(target_paths(model, Adapter(targets="kappatune", kappa_share=0.4))) == expected


# quantised bases --------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_is_trained_saved_and_continued(
    random_model: str, quantize: str, tmp_path: Path
) -> None:
    model = model_of(random_model, quantize=quantize)
    learner = learner_of(model)
    losses = train(learner, 4, AdapterOff(learner.trained))
    assert losses[-1] < losses[0]
    base = load_causal_lm(random_model, None, "auto").state_dict()
    error = 0.0
    for name, weight in learner.trained.base_model_weights():
        assert weight.shape == base[name].shape
        error = max(error, float((weight - base[name]).abs().max() / base[name].abs().max()))
    assert 0 < error < 0.2  # quantised, and dequantised in its own shape

    folder = write(learner, tmp_path / "adapter", random_model)
    state = {name: tensor.clone() for name, tensor in learner.optimizer_state()}
    continued = learner_of(model, adapter_from=folder)
    continued.restore(state, learner.state())
    for half in (learner, continued):
        train(half, 1, AdapterOff(half.trained))
    expected = dict(learner.adapter_weights())
    assert all(torch.equal(weight, expected[name]) for name, weight in continued.adapter_weights())


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_an_adapter_is_merged_into_what_its_quantised_base_was_and_the_card_says_so(
    random_model: str, quantize: str, tmp_path: Path
) -> None:
    learner = learner_of(model_of(random_model, quantize=quantize))
    train(learner, 2, AdapterOff(learner.trained))
    folder = write(learner, tmp_path / "adapter", random_model)
    assert soup_command([str(folder)], [], tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config") and merged.dtype == torch.float32
    weights = merged.state_dict()
    for name, weight in learner.model_weights():
        assert torch.allclose(weights[name], weight, rtol=0, atol=1e-6), name
    assert (logits(merged) - logits(learner.model)).abs().max() < (1e-4 if quantize == "nf4" else 1e-2)

    # peft adds it to the base's own weights, which is another model
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_model), str(folder))
    by_peft: Any = plain.merge_and_unload()  # pyright: ignore[reportCallIssue]
    assert (logits(by_peft) - logits(learner.model)).abs().max() > 2e-2
    card = (tmp_path / "merged/README.md").read_text()
    assert f"was stored as {quantize}" in card and "dequantised to float32" in card


@needs_bitsandbytes
def test_the_weights_for_an_engine_are_what_a_quantised_learner_computes_with(random_model: str) -> None:
    learner = learner_of(model_of(random_model, quantize="nf4"))
    train(learner, 2, AdapterOff(learner.trained))
    plain = load_causal_lm(random_model, None, "auto")
    plain.load_state_dict(dict(learner.model_weights()))
    assert (logits(plain) - logits(learner.model)).abs().max() < 1e-4
