"""One vLLM server, and two of which one is killed: the same final weights to the bit.

They are equal because the recipe's loss reads the tokens and the learner's own log-probs. The tokens are
equal whatever else is in a server's batch; the servers' log-probs may differ by rounding where a batch has a
single row, which another kernel computes, and enter the metrics only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rltrain.build.pool import build_pool_engine
from rltrain.checkpoint.journal import Journal, WaitingGroups
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.cli.replay import plan_command, replay_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.data.tokenization import load_tokenization
from rltrain.process import ALONE
from rltrain.rollout.controller import Controller
from rltrain.rollout.engines.vllm_pool import VllmPool
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.guard import TOKEN
from rltrain.rollout.worker.process import LocalWorker
from rltrain.sync.pool import PoolPush
from rltrain.timeline import read_timeline
from rltrain.types.samples import REFERENCE_VERSION, Prompt, Request, RolloutGroup, Sampling
from support.resumed_runs import ROOT, train_here
from support.resumed_runs import lines as read_lines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SETTINGS = (
    "rollout.engine=vllm_server",
    "rollout.prompts=6",
    "rollout.n=8",
    "rollout.dynamic_sampling=null",
    "learner.updates=1",
    "train.steps=3",
    "eval.every=0",
    "eval.at_start=false",
    "checkpoint.every=0",
)
REQUESTS = 40  # of which the worker has 32 rows


@pytest.fixture(scope="module")
def second_worker(vllm_worker: Any) -> Iterator[LocalWorker]:
    """Of the same model and with the same token; its test kills it."""
    worker = LocalWorker(vllm_worker.settings, token=vllm_worker.token)
    try:
        worker.wait_until_serving()
        yield worker
    finally:
        worker.close()


@pytest.fixture(scope="module")
def one_worker(vllm_worker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one worker."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    keys = [*SETTINGS, f"rollout.workers={{urls: ['{vllm_worker.address.url}']}}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, vllm_worker.token)
        assert train_here(vllm_worker.settings.model, folder, *keys) == 0
    return folder


def test_the_references_worker_samples_what_an_engine_does_that_is_lent(
    vllm_worker: Any, second_worker: LocalWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same final weights to the bit; the policy's worker never holds the reference model."""
    monkeypatch.setenv(TOKEN, vllm_worker.token)
    model = vllm_worker.settings.model
    aapo = (*SETTINGS, "train.steps=2", "rollout.prompts=2")
    first, second = vllm_worker.address.url, second_worker.address.url
    lent = f"rollout.server.url={first}"
    apart = (
        f"rollout.workers={{urls: ['{first}']}}",
        f"rollout.reference_workers={{urls: ['{second}']}}",
    )
    assert train_here(model, tmp_path / "lent", *aapo, lent, recipe_name="aapo") == 0
    pushed: list[tuple[set[str], int]] = []
    push = PoolPush.push

    def note(self: PoolPush, workers: Any, weights: Any, version: int) -> Any:
        pushed.append((set(workers), version))
        return push(self, workers, weights, version)

    monkeypatch.setattr(PoolPush, "push", note)
    assert train_here(model, tmp_path / "apart", *aapo, *apart, recipe_name="aapo") == 0
    assert pushed[0] == ({f"worker {second}"}, REFERENCE_VERSION)
    assert pushed[1:] == [({f"worker {first}"}, version) for version in range(3)]
    require_equal_models(tmp_path / "lent", tmp_path / "apart")


class Mixture:
    """Completions during which unrelated weights were pushed to the worker. weights: by version."""

    def __init__(self, engine: VllmPool, path: str) -> None:
        self.engine = engine
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        # without the second name of the tied head
        self.first = {name: weight.clone() for name, weight in self.model.named_parameters()}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def push(self) -> int:
        version = len(self.weights)
        noise = torch.Generator().manual_seed(version)
        self.weights[version] = {
            name: weight.detach() + 0.05 * torch.randn(weight.shape, generator=noise)
            for name, weight in self.first.items()
        }
        self.engine.load(self.weights[version].items(), version)
        return version

    def sample(self) -> list[RolloutGroup]:
        """Groups of one completion. When the first of many has come there is a push, and where none of the
        others was under way, that again.
        """
        free = self.engine.run_freely()
        version = self.push()
        for _ in range(20):
            for number in range(REQUESTS):
                prompt = Prompt(f"{number}", (5, 6 + number), "")
                free.begin(number, Request(prompt, Sampling(1, 1.0, 200, seed=version), 0, 1), version)
            answers = [free.next()]
            version = self.push()
            answers += [free.next() for _ in range(REQUESTS - 1)]
            groups = [answer[1] for answer in answers if answer is not None]
            mixed = [group for group in groups if len(group.completions[0].versions) > 1]
            if mixed:
                return mixed
        raise AssertionError("no completion went on after a push")

    def find_errors(self, group: RolloutGroup) -> list[float]:
        """For each version of the completion, the largest difference, in nats, of a log-prob from that which
        transformers computes with its weights.
        """
        (completion,) = group.completions
        prompt = group.prompt.token_ids
        tokens = torch.tensor(completion.token_ids)
        errors: list[float] = []
        for span in completion.versions:
            self.model.load_state_dict(self.weights[span.version], strict=False)
            with torch.no_grad():
                logits = self.model(torch.tensor([[*prompt, *completion.token_ids]])).logits
            expected = torch.log_softmax(logits[0, len(prompt) - 1 : -1].double(), -1)
            apart = expected.gather(1, tokens[:, None])[:, 0] - torch.tensor(completion.logprobs).double()
            errors.append(float(apart[span.start : span.stop].abs().max()))
        return errors


def test_tokens_before_a_push_are_the_old_policys_and_those_after_it_the_new_ones(
    vllm_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5, since vLLM computes the keys and values of what is under way anew; with those of the old
    weights the same comparison fails.
    """
    monkeypatch.setenv(TOKEN, vllm_worker.token)
    path = vllm_worker.settings.model
    urls = f"rollout.workers={{urls: ['{vllm_worker.address.url}']}}"
    keys = [f"model.path={path}", *SETTINGS, urls, "rollout.schedule={bounded: {versions: 1}}"]
    keys += ["data.max_prompt_tokens=16", "rollout.max_tokens=240"]
    recipe = check(load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=keys)).recipe
    assert isinstance(recipe, OnlineRecipe)
    tokenization = load_tokenization(recipe.model, recipe.data, recipe.rollout)
    engine = build_pool_engine(recipe.model, recipe.data, recipe.rollout, "no", tokenization, ALONE)
    try:
        mixture = Mixture(engine, path)
        for group in mixture.sample():
            assert max(mixture.find_errors(group)) < 1e-5

        pause = WorkerClient.pause
        monkeypatch.setattr(WorkerClient, "pause", lambda self, mode, _: pause(self, mode, False))
        errors = [mixture.find_errors(group) for group in mixture.sample()]
        assert max(before for before, *_ in errors) < 1e-5
        assert max(after for _, *others in errors for after in others) > 1e-2
    finally:
        engine.close()


def test_a_bounded_run_trains_on_exact_samples_and_is_replayed(
    vllm_worker: Any, one_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound of none it is the synchronous run, to the bit."""
    monkeypatch.setenv(TOKEN, vllm_worker.token)
    model = vllm_worker.settings.model
    keys = [*SETTINGS, f"rollout.workers={{urls: ['{vllm_worker.address.url}']}}"]
    assert train_here(model, tmp_path / "none", *keys, "rollout.schedule={bounded: {versions: 0}}") == 0
    require_equal_models(one_worker, tmp_path / "none")

    keys += ["rollout.schedule={bounded: {versions: 2}}", "control=[tis]", "eval.every=2"]
    assert train_here(model, tmp_path / "two", *keys) == 0
    lines = [line for line in read_lines(tmp_path / "two") if "staleness/max" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["staleness/max"] <= min(2, line["step"] - 1) for line in lines)
    assert {line["pool/workers"] for line in lines} == {1.0}
    journal = Journal(RunFolder(tmp_path / "two"))
    lanes = {line.lane for line in read_timeline(journal.folder.timeline)}
    assert lanes == {"learner", "pushes", f"worker {vllm_worker.address.url}"}
    assert journal.steps() == [1, 2, 3] and not WaitingGroups(journal.folder).numbers()
    assert replay_command(plan_command(tmp_path / "two", None, [], check=True), None, check=True) == 0


def test_two_workers_of_which_one_is_killed_train_what_one_does(
    vllm_worker: Any,
    second_worker: LocalWorker,
    one_worker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN, vllm_worker.token)
    first, second = vllm_worker.address.url, second_worker.address.url
    model = vllm_worker.settings.model
    ask = Controller.ask

    def ask_and_kill(self: Controller, name: str, *arguments: Any) -> None:
        ask(self, name, *arguments)
        if name == "take" and arguments[0] == 2:
            second_worker.kill()

    monkeypatch.setattr(Controller, "ask", ask_and_kill)
    two = [*SETTINGS, f"rollout.workers={{urls: ['{first}', '{second}']}}"]
    assert train_here(model, tmp_path / "two", *two) == 0
    lines = read_timeline(RunFolder(tmp_path / "two").timeline)
    kinds = [line.kind for line in lines if line.lane == f"worker {second}"]
    assert kinds[0] == "attached" and "sample" in kinds and kinds[-1] == "lost"
    assert {line.lane for line in lines} == {"learner", "pushes", f"worker {first}", f"worker {second}"}
    assert [line.facts["step"] for line in lines if line.kind == "learn"] == [1, 2, 3]
    assert second_worker.wait() != 0

    require_equal_models(one_worker, tmp_path / "two")


def require_equal_models(first: Path, second: Path) -> None:
    expected = load_file(first / "model/model.safetensors")
    held = load_file(second / "model/model.safetensors")
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)
