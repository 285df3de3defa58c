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

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.rollout.controller import Controller
from rltrain.rollout.worker.guard import TOKEN
from rltrain.rollout.worker.process import LocalWorker
from rltrain.sync.pool import PoolPush
from rltrain.timeline import read_timeline
from rltrain.types.samples import REFERENCE_VERSION
from support.resumed_runs import train_here

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


@pytest.fixture(scope="module")
def second_worker(vllm_worker: Any) -> Iterator[LocalWorker]:
    """Of the same model and with the same token; its test kills it."""
    worker = LocalWorker(vllm_worker.settings, token=vllm_worker.token)
    try:
        worker.wait_until_serving()
        yield worker
    finally:
        worker.close()


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


@pytest.fixture(scope="module")
def one_worker(vllm_worker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one worker."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, vllm_worker.token)
        assert train_here(vllm_worker.settings.model, folder, *on(vllm_worker)) == 0
    return folder


def on(*workers: Any) -> list[str]:
    return [*SETTINGS, f"rollout.workers={{urls: {[worker.address.url for worker in workers]}}}"]


def test_a_run_whose_controller_is_killed_ends_with_code_75_and_the_same_command_goes_on(
    vllm_worker: Any, one_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(TOKEN, vllm_worker.token)
    ask = Controller.ask

    def ask_and_kill(self: Controller, name: str, *arguments: Any) -> None:
        ask(self, name, *arguments)
        if name == "take" and arguments[0] == 2:
            self.process.kill()

    with monkeypatch.context() as patch:
        patch.setattr(Controller, "ask", ask_and_kill)
        assert train_here(vllm_worker.settings.model, tmp_path / "run", *on(vllm_worker)) == 75
    said = capsys.readouterr().out
    assert "the controller's process ended with exit code -9" in said and "continue with: " in said
    assert train_here(vllm_worker.settings.model, tmp_path / "run", *on(vllm_worker)) == 0
    require_equal_models(one_worker, tmp_path / "run")


def test_two_workers_of_which_one_is_killed_train_what_one_does(
    vllm_worker: Any,
    second_worker: LocalWorker,
    one_worker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN, vllm_worker.token)
    first, second = vllm_worker.address.url, second_worker.address.url
    ask = Controller.ask

    def ask_and_kill(self: Controller, name: str, *arguments: Any) -> None:
        ask(self, name, *arguments)
        if name == "take" and arguments[0] == 2:
            second_worker.kill()

    monkeypatch.setattr(Controller, "ask", ask_and_kill)
    two = on(vllm_worker, second_worker)
    assert train_here(vllm_worker.settings.model, tmp_path / "two", *two) == 0
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
