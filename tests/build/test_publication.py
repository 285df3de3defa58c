"""A push ends with the files on the Hub, whatever a Hub on the loopback answers on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http as hub_http
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.analysis.curves import Curves
from rltrain.build import publication
from rltrain.build.exported import export_run
from rltrain.build.publication import find_model, publication_of, push_model
from rltrain.checkpoint import hub as hub_module
from rltrain.checkpoint.export import export_model
from rltrain.checkpoint.hub import HubError
from rltrain.errors import UserError
from support.fake_hub import TOKEN, FakeHub, running_hub
from support.report_runs import RECIPE, write_run
from support.resumed_runs import train_here

ROOT = Path(__file__).parents[2]
REPOSITORY = "ann/small-grpo"


@pytest.fixture(scope="module")
def finished_run(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with metrics, recipe and a real model."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "small")
    recipe = yaml.safe_load(RECIPE) | {"model": {"path": random_model}}
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
    model = AutoModelForCausalLM.from_pretrained(random_model)
    export_model(folder / "model", model, AutoTokenizer.from_pretrained(random_model), "# card\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def curves_are_drawn_once() -> Iterator[None]:
    """matplotlib takes a second, and dozens of pushes here are of one run."""
    with pytest.MonkeyPatch.context() as patch:
        draw = publication._draw_curves
        drawn: list[bytes] = []  # the runs of this file have the same metrics

        def draw_once(curves: Curves) -> bytes:
            if not drawn:
                drawn.append(draw(curves))
            return drawn[0]

        patch.setattr(publication, "_draw_curves", draw_once)
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub of this test, which huggingface_hub in this process talks to without waiting between attempts."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0))
        monkeypatch.setattr(hub_module, "WAITS", (0.0, 0.0, 0.0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def push(run: Path, private: bool = True) -> tuple[str, list[str]]:
    lines: list[str] = []
    return str(push_model(find_model(run), REPOSITORY, private=private, report=lines.append)), lines


def stored_files(hub: FakeHub) -> dict[str, bytes]:
    return {
        path: data for path, data in hub.repositories[REPOSITORY].files.items() if path != ".gitattributes"
    }


def require_whole(hub: FakeHub, run: Path) -> None:
    files = stored_files(hub)
    listed = json.loads(files["files.sha256.json"])
    assert {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name in listed
    } == listed
    assert files.keys() - listed.keys() == {"files.sha256.json"}
    weights = (run / "model/model.safetensors").read_bytes()
    assert files["model.safetensors"] == weights
    assert {
        "README.md",
        "recipe.resolved.yaml",
        "curves.png",
        "config.json",
        "tokenizer.json",
    } <= files.keys()


def test_a_push_holds_every_file_and_a_second_one_sends_nothing(hub: FakeHub, finished_run: Path):
    summary, lines = push(finished_run)
    assert summary.startswith("pushed: ") and "verified" in summary and not lines
    require_whole(hub, finished_run)
    assert hub.repositories[REPOSITORY].private
    uploads = hub.calls["put"]
    summary, _ = push(finished_run)
    assert summary.startswith("nothing to push")
    assert hub.calls["put"] == uploads and len(hub.repositories[REPOSITORY].commits) == 2


@pytest.mark.parametrize("kind", [503, "reset"])
@pytest.mark.parametrize(
    "endpoint",
    ["whoami", "create", "info", "validate", "preupload", "batch", "put", "verify", "commit", "tree"],
)
def test_a_fault_at_any_endpoint_is_passed_over(
    hub: FakeHub, finished_run: Path, endpoint: str, kind: int | str
):
    fault = hub.fail(endpoint, kind)
    push(finished_run)
    assert fault.count == 0
    require_whole(hub, finished_run)
    assert len(hub.repositories[REPOSITORY].commits) == 2


def test_a_commit_that_landed_without_an_answer_is_not_made_twice(hub: FakeHub, finished_run: Path):
    hub.fail("commit", "landed")
    _, lines = push(finished_run)
    assert any("asking what" in line for line in lines)
    assert hub.calls["commit"] == 1 and len(hub.repositories[REPOSITORY].commits) == 2
    require_whole(hub, finished_run)


def test_a_content_that_the_hub_holds_wrongly_is_sent_again(hub: FakeHub, finished_run: Path):
    hub.fail("commit", "wrong")
    _, lines = push(finished_run)
    assert any("other contents of config.json" in line for line in lines)
    require_whole(hub, finished_run)


@pytest.mark.parametrize(
    ("endpoint", "kind", "message"),
    [
        ("whoami", 401, r"Invalid user token.*set HF_TOKEN"),
        ("create", 503, r"503.*push again later"),
        ("validate", 503, r"503.*push again later"),
        ("preupload", 403, r"set HF_TOKEN to a token that may write"),
        ("batch", 503, r"503.*push again later"),
        ("put", "reset", r"push again later"),
        ("commit", 503, r"did not take the commit.*503"),
        ("commit", "wrong", r"other contents of config.json"),
        ("tree", "reset", r"push again later"),
    ],
)
def test_a_fault_that_stays_is_one_line_with_the_remedy(
    hub: FakeHub, finished_run: Path, endpoint: str, kind: int | str, message: str
):
    hub.fail(endpoint, kind, count=10**6)
    with pytest.raises(HubError, match=message) as refused:
        push(finished_run)
    assert TOKEN not in str(refused.value) and "\n" not in str(refused.value)
    hub.faults.clear()
    push(finished_run)
    require_whole(hub, finished_run)


def test_no_token_no_right_and_no_private_repository_are_named(hub: FakeHub, finished_run: Path, monkeypatch):
    model = find_model(finished_run)
    with pytest.raises(HubError, match=r"403.*may not create.*token that may write there"):
        push_model(model, "another/model", private=True, report=print)
    push(finished_run, private=False)
    with pytest.raises(HubError, match=r"is public on the Hub.*--public"):
        push(finished_run)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(finished_run / "no-login"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no token.*set HF_TOKEN.*hf auth login"):
        push(finished_run)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*unset it"):
        push(finished_run)


def test_weights_of_an_earlier_push_that_a_loader_would_prefer_are_removed(hub: FakeHub, finished_run: Path):
    push(finished_run)
    files = hub.repositories[REPOSITORY].files
    files |= {"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    push(finished_run)
    assert stored_files(hub).keys() >= {"notes.txt"}
    assert not {"adapter_config.json", "model-00001-of-00002.safetensors"} & stored_files(hub).keys()


def test_a_damaged_file_and_one_with_the_token_are_not_pushed(
    hub: FakeHub, finished_run: Path, tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    with open(run / "model/config.json", "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"config.json is not what was written"):
        push(run)
    shutil.copyfile(finished_run / "model/config.json", run / "model/config.json")
    with open(run / "recipe.resolved.yaml", "a") as file:
        file.write(f"# {TOKEN}\n")
    with pytest.raises(HubError, match=r"holds the token.*not pushed") as refused:
        push(run)
    assert TOKEN not in str(refused.value)
    assert not hub.storage and "commit" not in hub.calls


def test_the_card_states_results_with_intervals_recipe_commit_curves_and_loading(
    hub: FakeHub, finished_run: Path
):
    push(finished_run)
    text = stored_files(hub)["README.md"].decode()
    (result,) = [item for item in ModelCard(text).data.eval_results or () if item.metric_type == "pass@1"]
    assert result.metric_value == 0.7
    assert result.metric_name == "pass@1, 95 % interval 0.65 to 0.75, before training 0.4"
    assert (result.dataset_name, result.dataset_split) == ("arithmetic", "test")
    for part in ("0.2.0, commit abc123", "![curves of the run](curves.png)", f"vllm serve {REPOSITORY}"):
        assert part in text
    recipe = stored_files(hub)["recipe.resolved.yaml"].decode()
    assert recipe == (finished_run / "recipe.resolved.yaml").read_text() and recipe.strip() in text
    assert stored_files(hub)["curves.png"].startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_model_loads_from_the_hub_as_its_card_says(hub: FakeHub, finished_run: Path, tmp_path: Path):
    push(finished_run)
    text = stored_files(hub)["README.md"].decode()
    code = text.partition("```python\n")[2].partition("```")[0]
    code += "print(model.num_parameters(), len(tokenizer))"
    done = run_python(["-c", code], hub, tmp_path)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(finished_run / "model")
    assert done.stdout.split()[0] == str(model.num_parameters())


@pytest.mark.slow
def test_an_adapter_is_pushed_as_one_and_loads_as_its_card_says(
    hub: FakeHub, finished_run: Path, tmp_path: Path, random_model: str
):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install rltrain[dev])")
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("model"))
    adapter = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(random_model), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapter.save_pretrained(run / "model")
    AutoTokenizer.from_pretrained(random_model).save_pretrained(run / "model")
    push(run)
    text = stored_files(hub)["README.md"].decode()
    assert "library_name: peft" in text and "--enable-lora" in text
    assert "model.safetensors" not in stored_files(hub)
    code = text.partition("```python\n")[2].partition("```")[0] + "print(type(model).__name__)"
    done = run_python(["-c", code], hub, tmp_path)
    assert done.stdout.split() == ["PeftModel"], done.stderr


def run_python(arguments: list[str], hub: FakeHub, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment_of(hub, home), capture_output=True, text=True
    )


def environment_of(hub: FakeHub, home: Path) -> dict[str, str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.mark.slow
def test_hf_xet_uploads_a_push_and_one_killed_before_its_commit_is_finished(
    hub: FakeHub, finished_run: Path, tmp_path: Path
):
    """The library that users have: it writes chunks to a folder, from which the Hub puts files together."""
    pytest.importorskip("hf_xet", reason="hf_xet is not installed (huggingface_hub needs it)")
    hub.xet = tmp_path / "chunks"
    hub.xet.mkdir()
    command = [sys.executable, "-m", "rltrain", "push", str(finished_run), REPOSITORY]
    environment = environment_of(hub, tmp_path) | {"HF_HUB_DISABLE_XET": "0"}
    fault = hub.fail("commit", "hold")
    running = subprocess.Popen(command, cwd=ROOT, env=environment)
    assert fault.reached.wait(300)
    running.kill()
    running.wait()
    fault.release.set()
    assert len(hub.repositories[REPOSITORY].commits) == 1
    hub.fail("xet", 503)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    require_whole(hub, finished_run)
    assert hub.calls["xet"] >= 2 and hub.calls["put"] == 0
    assert len(hub.repositories[REPOSITORY].commits) == 2
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["put", "commit"])
def test_a_push_killed_in_the_middle_is_finished_by_the_same_command(
    hub: FakeHub, finished_run: Path, tmp_path: Path, endpoint: str
):
    command = ["-m", "rltrain", "push", str(finished_run), REPOSITORY]
    fault = hub.fail(endpoint, "hold")
    running = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment_of(hub, tmp_path))
    assert fault.reached.wait(300)
    running.kill()
    running.wait()
    fault.release.set()
    assert len(hub.repositories[REPOSITORY].commits) == 1
    before = hub.calls["put"]
    done = run_python(command, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    require_whole(hub, finished_run)
    assert endpoint == "put" or hub.calls["put"] == before  # what was uploaded is not sent again
    written = [path for path in (*tmp_path.rglob("*"), *finished_run.rglob("*")) if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path, data in stored_files(hub).items() if TOKEN.encode() in data]


def test_a_dry_run_asks_the_hub_nothing(hub: FakeHub, finished_run: Path, capsys):
    from rltrain.cli.push import push_command

    assert push_command(finished_run, REPOSITORY, private=True, dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "## Results" in printed
    assert not hub.calls


def test_a_folder_without_a_run_or_model_is_named(tmp_path: Path, finished_run: Path):
    with pytest.raises(UserError, match=r"neither a run .* nor a model"):
        find_model(tmp_path)
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(UserError, match=r"neither a finished model nor a checkpoint"):
        find_model(tmp_path / "run")
    model = shutil.copytree(finished_run / "model", tmp_path / "alone")
    pushed = publication_of(find_model(model), REPOSITORY)
    assert pushed.files.keys() == {path.name for path in model.iterdir()}
    assert pushed.files["README.md"] == model / "README.md"
    assert find_model(finished_run / "model").step == 100


def test_an_export_is_a_model_folder_in_the_wanted_precision(finished_run: Path, tmp_path: Path):
    out = export_run(finished_run, tmp_path / "half", None, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert str(model.dtype) == "torch.bfloat16"
    assert "| steps | 100 of 100 |" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="exists already"):
        export_run(finished_run, out, None, "float32")
    with pytest.raises(UserError, match=r"no checkpoint step-7; checkpoints: none"):
        export_run(finished_run, tmp_path / "other", "step-7", "float32")


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_its_model_and_the_same_command_finishes_a_push(
    hub: FakeHub, random_model: str, tmp_path: Path, capfd
):
    run = tmp_path / "run"
    settings = ("checkpoint.every=3", "checkpoint.keep=1", "push.every=3", f"push.repo={REPOSITORY}")
    hub.fail("tree", 403, count=10**6)
    with pytest.raises(UserError, match=rf"is whole, but not on the Hub: .*403.*\n.*rltrain push {run}"):
        train_here(random_model, run, *settings)
    hub.faults.clear()
    assert train_here(random_model, run, *settings) == 0
    require_whole(hub, run)
    printed = "".join(capfd.readouterr())
    assert "step-3 is not pushed, a later push will be: the Hub refused" in printed
    assert TOKEN not in printed
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_an_export_of_a_checkpoint_in_parts_is_the_model_at_that_step(random_model: str, tmp_path: Path):
    run = tmp_path / "run"
    assert train_here(random_model, run, "checkpoint.format=sharded") == 0
    out = export_run(run, tmp_path / "exported", "step-6", "float32")
    exported = load_file(out / "model.safetensors")
    finished = load_file(run / "model/model.safetensors")
    assert exported.keys() == finished.keys()
    assert all(torch.equal(exported[name], finished[name]) for name in finished)
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match=r"holds the ranks' parts.*rltrain export"):
        find_model(run)
