"""Code in a model folder runs only where the recipe names the folder, and nobody is ever asked for
permission.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from rltrain.cli import app as cli
from rltrain.errors import UserError
from rltrain.remote_code import trust_copy, trusting, trusts

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
Path(__file__).with_name("ran").touch()
Path({mark!r}).touch()
class OwnConfig(Qwen2Config):
    model_type = "own_kind"
class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tiny_models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a type that transformers does not know, whose code leaves the file ``ran`` beside
    the folder.
    """
    path = tiny_models.make_random_model(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "own_kind", "auto_map": mapped}))
    (path / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["rltrain", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    return run


def training(*overrides: str, run: str = "run", steps: int = 1) -> list[str]:
    small = [
        "rollout.prompts=2",
        "rollout.n=2",
        "data.eval=null",
        "checkpoint.every=1",
        f"train.steps={steps}",
    ]
    words = [word for override in (*small, *overrides) for word in ("--set", override)]
    return ["train", str(ROOT / "recipes/policy/grpo.yaml"), "--profile", "tiny_cpu", "--run", run, *words]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "model", "1+1="],
        ["score", "model", "rows.jsonl", "--out", "o.jsonl", "--reference", "none", "--beta", "1"],
        ["soup", "model", "model", "--out", "soup"],
        training("model.path=model"),
        training("model.path=plain", "model.reference=model", "loss.terms=[{name: kl, coefficient: 0.1}]"),
    ],
    ids=["generate", "score", "soup", "train", "reference"],
)
def test_code_that_nobody_named_does_not_run_and_the_remedy_is_said(
    call, folder: Path, command, capsys, tiny_models
) -> None:
    # stdin says "y" to everything: transformers used to ask there
    tiny_models.make_random_model(folder.with_name("plain"))
    folder.with_name("rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    assert call(*command) == 2
    said = capsys.readouterr()
    assert "model.trust_remote_code: [model]" in said.err
    assert "Do you wish to run" not in said.out + said.err
    assert not folder.with_name("ran").exists()


def test_a_named_folder_trains_and_goes_on_and_its_code_is_said(call, folder: Path, capsys) -> None:
    trusted = ("model.path=model", "model.trust_remote_code=[model]")
    assert call(*training(*trusted)) == 0
    said = capsys.readouterr().err
    assert "code of model may run (sha256): own.py" in said
    assert folder.with_name("ran").exists()
    # The checkpoint's copy of the code is the trusted one.
    assert call(*training(*trusted, steps=2)) == 0
    assert call("generate", "run/model", "1+1=", "--max-tokens", "4") == 2
    assert call("generate", "run/model", "1+1=", "--max-tokens", "4", "--trust-remote-code", "run/model") == 0


def test_other_code_in_a_checkpoint_does_not_run(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "own.py").write_bytes((folder / "own.py").read_bytes())
    with trusting([str(folder)]):
        trust_copy(copy, str(folder), None)
        assert trusts(str(copy))
    (copy / "own.py").write_text("raise SystemExit")
    with trusting([str(folder)]), pytest.raises(UserError, match="not the file of that name"):
        trust_copy(copy, str(folder), None)
    with trusting([]):
        trust_copy(copy, str(folder), None)  # nothing is trusted, so nothing is copied
        assert not trusts(str(copy))


@pytest.mark.parametrize(
    "entry", ["nobody/model", "nobody/model@main", "nobody/model@0123abc", "@" + COMMIT, "absent/folder"]
)
def test_an_entry_that_pins_no_code_is_refused(entry: str) -> None:
    with (
        pytest.raises(UserError, match="is no folder; for a model on the Hub write NAME@COMMIT"),
        trusting([entry]),
    ):
        pass


def test_a_commit_is_trusted_at_that_commit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # No config names code of another repository.
    monkeypatch.setattr("rltrain.remote_code.local_file", lambda *_: None)
    with trusting([f"somebody/model@{COMMIT}"]):
        assert trusts("somebody/model", COMMIT)
        assert not trusts("somebody/model", None)
        assert not trusts("somebody/model", "main")
        assert not trusts("somebody/other", COMMIT)
    assert not trusts("somebody/model", COMMIT)


def test_a_folder_is_trusted_under_every_spelling_and_not_its_neighbours(
    folder: Path, tmp_path: Path
) -> None:
    with trusting([str(folder)]):
        assert trusts("model") and trusts("./model/") and trusts(str(tmp_path / "model/../model"))
        assert not trusts(str(tmp_path))


@pytest.mark.parametrize(
    "mapped",
    [
        {"AutoConfig": "somebody/code--own.OwnConfig"},
        {"AutoTokenizer": ["own.Slow", "somebody/code--own.Fast"]},
    ],
)
def test_code_of_yet_another_repository_is_refused(folder: Path, mapped: dict[str, object]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": mapped}))
    with trusting([str(folder)]), pytest.raises(UserError, match="from another repository"):
        trusts(str(folder))
