"""Properties of every architecture: a row's log-probs do not depend on other rows, the engine's log-probs are
the learner's, and training draws no random numbers.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.config.schema import LearnerCore, Model, Optimizer
from rltrain.errors import UserError
from rltrain.learner.forward import PolicyForward
from rltrain.learner.loading import load_causal_lm
from rltrain.learner.packing import build
from rltrain.learner.preference_learner import PreferenceLearner, lengths_of, pair_rows
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.groups import sample_groups
from rltrain.types.policy import TokenRows
from rltrain.types.preference import CompletionFacts, PairBatch
from rltrain.types.samples import Prompt, Sampling
from rltrain.weight_names import CheckpointNames
from support.architectures import ARCHITECTURES, ORIGINAL_CONTEXT, tiny

CLOSE = 1e-5  # nats, float32
LEARNER_REFUSES = {
    "gemma2": "does not give the output of its head as logits .final_logit_softcapping is 30.0.",
    "qwen2_vl": "does not load as a causal language model: Unrecognized configuration class",
}
TRAINING_REFUSES = {
    "phimoe": "in train mode PhimoeForCausalLM gives one row log-probs that differ by .* from call to call"
}
ENGINE_REFUSES = {
    "bloom": "has no max_position_embeddings, which bounds the transformers engine's cache",
    "mamba": "has linear_attention layers, which the transformers engine cannot cache",
    "mamba2": "has linear_attention layers, which the transformers engine cannot cache",
    "jamba": "has linear_attention layers, which the transformers engine cannot cache",
    "lfm2": "has conv layers, which the transformers engine cannot cache",
}
LEARNS = [name for name in ARCHITECTURES if name not in LEARNER_REFUSES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``folder(name)`` is the folder of a tiny model, made once."""
    folders: dict[str, Path] = {}

    def find(name: str) -> str:
        if name not in folders:
            folders[name] = tiny(name, tmp_path_factory.mktemp(name) / "model")
        return str(folders[name])

    return find


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(5, 90) for _ in range(count))


def some_rows(longest: int) -> TokenRows:
    """Six rows of 2 to ``longest`` tokens, which one micro-batch takes together."""
    rng = random.Random(1)
    lengths = [longest, 2, longest // 2, longest - 1, 4, 3]
    prompts = tuple(tokens(rng, max(length // 2, 1)) for length in lengths)
    pairs = zip(lengths, prompts, strict=True)
    completions = tuple(tokens(rng, length - len(prompt)) for length, prompt in pairs)
    return TokenRows(prompts, completions)


def longest_row(name: str) -> int:
    """Tokens of a row longer than the sliding windows, within the model's context."""
    return ORIGINAL_CONTEXT if name == "phi3_longrope" else 40


def log_probs(policy: PolicyForward, rows: TokenRows, *positions: int) -> Tensor:
    """(r, T) of the rows at ``positions``, read together."""
    with torch.no_grad():
        micro_batch = build(rows, positions, layout="padded")
        return policy(micro_batch, temperature=1.0, wants=frozenset({"logp"}), chunk=4096)["logp"]


def largest_change_by_other_rows(policy: PolicyForward, rows: TokenRows) -> float:
    together = log_probs(policy, rows, *range(len(rows)))
    changes = []
    for row in range(len(rows)):
        single = log_probs(policy, rows, row)[0]
        changes.append(float((together[row, : len(single)] - single).abs().max()))
    return max(changes)


@pytest.mark.parametrize("name", LEARNS)
def test_a_rows_log_probs_do_not_depend_on_other_rows(name: str, folder: Any) -> None:
    policy = PolicyForward(load_causal_lm(folder(name), None, "auto")).eval()
    assert largest_change_by_other_rows(policy, some_rows(longest_row(name))) < CLOSE


@pytest.mark.parametrize("name", [name for name in LEARNS if name not in ENGINE_REFUSES])
def test_the_embedded_engine_samples_with_the_learners_log_probs(name: str, folder: Any) -> None:
    model = load_causal_lm(folder(name), None, "auto")
    rng = random.Random(2)
    engine = TransformersEngine(
        folder(name), stop_token_ids=[1], pad_token_id=0, decode=lambda _: "", max_rows=4
    )
    engine.load(CheckpointNames(model).to_checkpoint(model.state_dict().items()), 0)
    new = min(longest_row(name), 24) // 2  # it decodes up to the sliding window
    prompts = [Prompt(str(length), tokens(rng, length), "") for length in (new, 1, new // 2)]

    groups = sample_groups(engine, prompts, Sampling(n=2, temperature=1.0, max_tokens=new, seed=0), 0)

    sampled = [(group.prompt.token_ids, completion) for group in groups for completion in group.completions]
    rows = TokenRows(
        tuple(prompt for prompt, _ in sampled), tuple(completion.token_ids for _, completion in sampled)
    )
    policy = PolicyForward(model).eval()
    for row, (_, completion) in enumerate(sampled):
        expected = log_probs(policy, rows, row)[0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(("name", "reason"), ENGINE_REFUSES.items())
def test_the_embedded_engine_refuses_what_it_would_decode_otherwise(
    name: str, reason: str, folder: Any
) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        TransformersEngine(folder(name), stop_token_ids=[1], pad_token_id=0, decode=lambda _: "", max_rows=4)
    message = str(refused.value)
    assert "use rollout.engine vllm" in message or "needs rollout.engine vllm" in message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "reason"), LEARNER_REFUSES.items())
def test_the_learner_refuses_what_it_would_compute_otherwise(name: str, reason: str, folder: Any) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        PolicyForward(load_causal_lm(folder(name), None, "auto"))
    assert "\n" not in str(refused.value)


# training ---------------------------------------------------------------------------------------------------


def learner_of(path: str) -> PreferenceLearner:
    core = LearnerCore(optimizer=Optimizer(lr=1e-3), tokens_per_micro_batch=64)  # several micro-batches
    return PreferenceLearner(Model(path=path), core, total_updates=1, seed=0)


@pytest.mark.parametrize("name", [name for name in LEARNS if name not in TRAINING_REFUSES])
def test_dpo_begins_at_ln_2(name: str, folder: Any) -> None:
    # The policy is its own reference, so every log-ratio is 0 unless train mode draws random numbers or
    # differs from eval mode.
    learner = learner_of(folder(name))
    rows = some_rows(longest_row(name))
    pairs = pair_rows(rows.prompts[:5], rows.completions[:5], rows.completions[1:])
    reference = learner.log_probs(pairs, sides=2)
    lengths = lengths_of(pairs)
    chosen, rejected = (
        CompletionFacts(lengths[half], ref_logp=reference[half]) for half in (slice(0, 5), slice(5, None))
    )

    objective = PreferenceObjective(PREFERENCE_LOSSES.bind("dpo", {"beta": 1.0}))
    result = learner.update_examples(pairs, PairBatch(chosen, rejected, torch.arange(5)), objective)

    assert result.stepped and result.metrics["loss/total"] == pytest.approx(math.log(2), abs=CLOSE)


@pytest.mark.parametrize(("name", "reason"), TRAINING_REFUSES.items())
def test_what_stays_random_in_train_mode_is_refused(name: str, reason: str, folder: Any) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        learner_of(folder(name))
    assert "set its dropout, noise or sampling to 0 in config.json" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "attribute"), [("opt", "dropout"), ("starcoder2", "residual_dropout"), ("gpt2", "attn_pdrop")]
)
def test_what_is_switched_off_for_training_stands_in_the_config_that_is_written(
    name: str, attribute: str, folder: Any
) -> None:
    model: Any = load_causal_lm(folder(name), None, "auto")
    assert getattr(model.config, attribute) == 0.1
    assert getattr(model.base_model.config, attribute) == 0
