"""Truncated sampling: which tokens stay, what ends a completion, and that the learner renormalises over what
the engine drew from.
"""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rltrain.learner.forward import PolicyForward
from rltrain.learner.kept_tokens import with_kept_tokens
from rltrain.learner.packing import build
from rltrain.learner.shared_prompt import build_shared
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.truncation import cut_at_stop, kept_counts, kept_tokens, penalise_repetition_
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Completion, Prompt, Sampling, Span, TokenSets, Truncation

HALVES = [0.5, 0.25, 0.125, 0.0625, 0.0625]


@pytest.mark.parametrize(
    ("truncation", "count"),
    [
        (Truncation(), 5),
        (Truncation(top_k=3), 3),
        (Truncation(top_k=9), 5),
        (Truncation(top_p=0.75), 2),  # 0.5 + 0.25 is enough
        (Truncation(top_p=0.76), 3),
        (Truncation(top_p=1e-9), 1),
        (Truncation(min_p=0.25), 3),  # at least 0.125
        (Truncation(min_p=1.0), 1),
        # entropy of all: 1.875 ln 2. Of two: (2/3, 1/3), 0.918 ln 2; of three: (4/7, 2/7, 1/7), 1.379 ln 2
        (Truncation(top_h=0.5), 2),
        (Truncation(top_h=0.74), 3),
        (Truncation(top_h=0.4), 1),  # 0.918 is above 0.75
        # of the two that top_k leaves, 2/3 is enough; top_p alone would take three
        (Truncation(top_k=2, top_p=0.6), 1),
        (Truncation(min_p=0.25, top_p=0.99), 3),
    ],
)
def test_how_many_tokens_stay(truncation: Truncation, count: int) -> None:
    assert kept_counts(torch.tensor([HALVES, HALVES]), truncation).tolist() == [count, count]


@pytest.mark.parametrize(
    ("truncation", "warper"),
    [
        (Truncation(top_k=7), TopKLogitsWarper(7)),
        (Truncation(top_p=0.9), TopPLogitsWarper(0.9)),
        (Truncation(min_p=0.05), MinPLogitsWarper(0.05)),
    ],
)
def test_the_tokens_are_those_that_transformers_keeps(truncation: Truncation, warper: Any) -> None:
    logits = 3 * torch.randn(40, 90, generator=torch.Generator().manual_seed(1))
    ids: Any = torch.zeros(40, 1, dtype=torch.int64)
    expected = warper(ids, logits.clone()) > -torch.inf
    assert torch.equal(kept_tokens(logits, truncation), expected)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9, 1.0])
def test_top_h_keeps_tokens_while_their_entropy_is_within_its_share(share: float) -> None:
    logits = 3 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = kept_tokens(logits, Truncation(top_h=share))
    for row, kept in zip(logits, got, strict=True):
        ordered = row.softmax(-1).sort(descending=True).values
        limit = share * torch.distributions.Categorical(ordered).entropy() + 1e-12
        entropies = [torch.distributions.Categorical(ordered[:count]).entropy() for count in range(1, 31)]
        count = next((n for n, entropy in enumerate(entropies) if entropy > limit), 30)
        assert int(kept.sum()) == count
        assert bool(kept[row.argmax()])


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    texts = [[1, 1, 5, 7], [2, 3, 2, 3], [19, 0, 4, 4]]
    ids: Any = torch.tensor(texts)
    expected: Any = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())  # type: ignore[arg-type]
    torch.testing.assert_close(penalise_repetition_(logits, texts, 1.3), expected, rtol=0, atol=0)


def test_logits_that_are_not_finite_keep_every_token() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]])
    assert kept_tokens(logits, Truncation(top_k=1)).tolist() == [[True] * 3, [False, False, True]]


def test_a_completion_ends_with_the_token_that_completes_a_stop_text() -> None:
    def decode(tokens: Any) -> str:
        return "".join("abc. "[token] for token in tokens)

    tokens = (0, 3, 4, 1, 3, 4, 2)
    sets = TokenSets(array("i", [0, 1, 3, 4, 1, 3, 4, 2]), array("i", [2, *[1] * 6]), array("f", [1] * 7))
    versions = (Span(0, 4, 1), Span(4, 7, 2))
    completion = Completion(tokens, (-1.0,) * 7, "length", decode(tokens), versions, kept=sets)
    cut = cut_at_stop(completion, ("b.", "zz"), decode)
    assert (cut.text, cut.finish, cut.token_ids) == ("a. b.", "stop", tokens[:5])
    assert cut.versions == (Span(0, 4, 1), Span(4, 5, 2))
    assert cut.kept == TokenSets(
        array("i", [0, 1, 3, 4, 1, 3]), array("i", [2, *[1] * 4]), array("f", [1] * 5)
    )
    assert cut_at_stop(completion, ("zz",), decode) is completion


@pytest.fixture(scope="module")
def sampled(random_model: str) -> Any:
    """(model, engine, prompts) of a small random model."""
    model: Any = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(random_model)
    engine = TransformersEngine(
        random_model,
        stop_token_ids={tokenizer.eos_token_id},
        pad_token_id=0,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        max_rows=8,
    )
    engine.load(((name, value.detach()) for name, value in model.named_parameters()), 1)
    prompts = [Prompt(text, tuple(tokenizer(text).input_ids), text) for text in ("12+34=", "x", "What is")]
    return model, engine, prompts


TRUNCATION = Truncation(min_p=0.02, top_h=0.95, top_k=20, top_p=0.8)


def test_the_learner_has_the_log_probs_of_the_distribution_that_the_engine_drew_from(sampled: Any) -> None:
    model, engine, prompts = sampled
    sampling = Sampling(5, 0.7, 12, seed=3, truncation=TRUNCATION, returns_kept=True)
    groups = sample_groups(engine, prompts, sampling, 1)
    written = [(group.prompt, completion) for group in groups for completion in group.completions]
    kept = [completion.kept for _, completion in written]
    kept[2] = None  # a row that nothing truncated, among the others
    rows = TokenRows(
        tuple(prompt.token_ids for prompt, _ in written),
        tuple(completion.token_ids for _, completion in written),
        kept=tuple(kept),
    )
    forward = PolicyForward(model)
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [[row for row in shuffled if rows.prompts[row] == prompt.token_ids] for prompt in prompts]
    for micro_batch in (build(rows, shuffled, layout="padded"), build_shared(rows, lines)):
        with_sets = with_kept_tokens(micro_batch, rows)
        for chunk in (4, 1000):
            statistics = forward(
                with_sets, temperature=0.7, wants=frozenset({"logp", "entropy"}), chunk=chunk
            )
            assert statistics.keys() == {"logp", "entropy"}
            for index, row in enumerate(micro_batch.rows.tolist()):
                completion = written[row][1]
                got = statistics["logp"][index, : len(completion.token_ids)]
                if row != 2:
                    torch.testing.assert_close(got, torch.tensor(completion.logprobs), rtol=0, atol=2e-5)
                else:
                    mass = torch.tensor(completion.kept.mass.tolist())
                    expected = torch.tensor(completion.logprobs) + mass.log()
                    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert max(size for sets in kept if sets for size in sets.sizes) > 3


def test_the_gradient_is_that_of_the_renormalised_log_prob(sampled: Any) -> None:
    model, engine, prompts = sampled
    sampling = Sampling(2, 1.0, 6, seed=4, truncation=Truncation(top_k=5), returns_kept=True)
    groups = sample_groups(engine, prompts[:1], sampling, 1)
    completions = groups[0].completions
    rows = TokenRows(
        (prompts[0].token_ids,) * 2,
        tuple(completion.token_ids for completion in completions),
        kept=tuple(completion.kept for completion in completions),
    )
    micro_batch = with_kept_tokens(build(rows, [0, 1], layout="padded"), rows)
    weight = model.get_output_embeddings().weight
    statistics = PolicyForward(model)(micro_batch, temperature=1.0, wants=frozenset({"logp"}), chunk=4)
    (got,) = torch.autograd.grad(statistics["logp"].sum(), weight)

    total = torch.zeros(())
    for completion in completions:
        ids = torch.tensor([[*prompts[0].token_ids, *completion.token_ids]])
        logits = model(ids).logits[0, len(prompts[0].token_ids) - 1 : -1]
        start = 0
        assert completion.kept is not None
        for place, size in enumerate(completion.kept.sizes):
            kept = completion.kept.ids[start : start + size].tolist()
            start += size
            logp = logits[place, kept].log_softmax(-1)
            total = total + logp[kept.index(completion.token_ids[place])]
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_embedded_engine_stops_at_a_text_and_penalises_what_it_has_written(sampled: Any) -> None:
    _, engine, prompts = sampled
    plain = sample_groups(engine, prompts, Sampling(5, 1.0, 12, seed=3), 1)
    texts = [completion.text for group in plain for completion in group.completions]
    stop = max(
        "0123456789abcdefghijklmnopqrstuvwxyz+", key=lambda letter: sum(letter in text for text in texts)
    )
    stopped = sample_groups(engine, prompts, Sampling(5, 1.0, 12, seed=3, stop=(stop,)), 1)
    assert any(stop in text[:-1] for text in texts)
    for text, completion in zip(texts, (row for group in stopped for row in group.completions), strict=True):
        expected = text[: text.find(stop) + 1] if stop in text else text
        assert completion.text == expected
        assert stop not in text or completion.finish == "stop"
    greedy = sample_groups(engine, prompts, Sampling(1, 0.0, 12, seed=3, repetition_penalty=50.0), 1)
    for group in greedy:
        tokens = [*group.prompt.token_ids, *group.completions[0].token_ids]
        assert len(set(tokens)) >= len(set(group.prompt.token_ids)) + 11


def test_a_run_whose_sampling_is_truncated_is_exact(random_model: str, tmp_path: Path) -> None:
    # the engine's log-probs and the learner's agree, over the kept tokens, after updates as well
    import json

    from rltrain.cli.train import train_command
    from rltrain.config.load import load_recipe
    from rltrain.config.rules import check

    overrides = [f"model.path={random_model}", "rollout.top_p=0.7", "train.steps=2", "eval.prompts=4"]
    overrides += ["eval.top_h=0.4", "eval.repetition_penalty=1.1", "rollout.stop=['zz']"]
    recipe = load_recipe(
        Path(__file__).parents[2] / "recipes" / "policy" / "grpo.yaml",
        profile="tiny_cpu",
        overrides=overrides,
    )
    assert train_command(check(recipe).recipe, tmp_path / "run", []) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "rollout/mass_cut" in line]
    assert len(steps) == 2
    for line in steps:
        assert 0.05 < line["rollout/mass_cut"] < 0.5
        assert line["rollout/mismatch_abs"] < 1e-5
