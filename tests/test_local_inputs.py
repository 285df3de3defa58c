"""Mistakes in local inputs are one line before torch is imported, and prompts that cannot be decoded before
any weight is loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from rltrain.build.inputs import require_decodable
from rltrain.build.local_inputs import require_local_inputs
from rltrain.config.load import load_recipe
from rltrain.errors import UserError
from rltrain.types.samples import Prompt

ROOT = Path(__file__).parents[1]
GRPO = ROOT / "recipes/policy/grpo.yaml"
DPO = ROOT / "recipes/preference/dpo.yaml"


def rows(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def recipe_of(path: Path, *overrides: str) -> Any:
    return load_recipe(path, profile="tiny_cpu", overrides=[*overrides, "data.eval=null"])


@pytest.mark.parametrize(
    ("path", "lines", "message"),
    [
        (GRPO, ({"prompt": "1"}, {"question": "2"}), "line 2: no column 'prompt'"),
        (GRPO, ({"prompt": "1"}, "{"), "line 2: not JSON"),
        (DPO, ({"prompt": "1", "chosen": "2"},), "line 1: neither chosen and rejected"),
    ],
)
def test_malformed_rows_are_told_with_file_and_line(
    tmp_path: Path, path: Path, lines: Any, message: str
) -> None:
    file = rows(tmp_path / "a.jsonl", *lines)
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}"):
        require_local_inputs(recipe_of(path, f"model.path={tmp_path.parent}", f"data.train={file}"))


@pytest.fixture(autouse=True)
def a_folder_with_a_config(tmp_path: Path) -> None:
    (tmp_path.parent / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.train=here/none.jsonl",), "data set 'here/none.jsonl': no such file or folder"),
        (("data.train=./none",), "data set './none': no such file or folder"),
        (("model.path=./none",), "model.path './none': no such folder"),
        (("model.path=a/b/none",), "model.path 'a/b/none': no such folder"),
        (("model.path={tmp}",), "is no model folder: it has no config.json"),
    ],
)
def test_paths_at_which_nothing_is(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    model = f"model.path={tmp_path.parent}"
    with pytest.raises(UserError, match=message):
        require_local_inputs(recipe_of(GRPO, model, *(text.format(tmp=tmp_path) for text in settings)))


def test_of_an_adapter_its_base_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./none"}))
    with pytest.raises(
        UserError, match=r"model\.path: the base of the adapter '.*' './none': no such folder"
    ):
        require_local_inputs(recipe_of(GRPO, f"model.path={tmp_path}"))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path.parent)})
    )
    require_local_inputs(recipe_of(GRPO, f"model.path={tmp_path}"))


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rltrain.build.local_inputs.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package vllm is not installed here; install it"):
        require_local_inputs(recipe_of(GRPO, "rollout.engine=vllm"))


def test_names_on_the_hub_and_built_in_tasks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    require_local_inputs(recipe_of(GRPO, "model.path=someone/model"))
    require_local_inputs(recipe_of(GRPO, "model.path=someone/model", "data.train=someone/data"))
    require_local_inputs(recipe_of(DPO, "model.path=someone/model"))


TRAIN = ("train", str(GRPO), "--profile", "tiny_cpu", "--run", "run")
TINY = (str(GRPO), "--profile", "tiny_cpu", "--set", "model.path=./none")
SCORED = ("--out", "x", "--reference", "none", "--beta", "1")
NOTHING = "'./none': no such folder"
MISTAKES = [
    ((*TRAIN, "--set", "model.path={model}", "--set", "data.train=none.jsonl"), "data set 'none.jsonl': no"),
    ((*TRAIN, "--set", "model.path=./none"), f"model.path {NOTHING}"),
    (
        (*TRAIN, "--set", "model.path=nobody/none"),
        "model.path 'nobody/none' is no model folder, and as a name",
    ),
    ((*TRAIN, "--set", "model.path={model}", "--set", "model.teacher=./none"), f"model.teacher {NOTHING}"),
    ((*TRAIN, "--set", "rollout.n=many"), "rollout.n"),
    ((*TRAIN, "--set", "data.chat_template=none.jinja"), "none.jinja' cannot be read"),
    (
        (*TRAIN, "--set", "model.path={model}", "--run", "{full}"),
        "holds files that are not a run's (thesis.tex)",
    ),
    ((*TRAIN, "--set", "model.path={model}", "--resume", "none"), "none: files.sha256.json is missing"),
    (("train",), "Missing argument 'RECIPE'. (see"),
    (("trian",), "No such command 'trian'. Did you mean 'train'?"),
    (("doctor", *TINY), f"model.path {NOTHING}"),
    (("compare", *TINY), f"model.path {NOTHING}"),
    (("worker", *TINY), f"model.path {NOTHING}"),
    (("eval", "./none", "--recipe", *TINY), f"MODEL {NOTHING}"),
    (("eval", "{model}", "--kl-to", "./none", "--recipe", *TINY), f"--kl-to {NOTHING}"),
    (("generate", "./none", "1+1="), f"MODEL {NOTHING}"),
    (("score", "./none", "rows.jsonl", *SCORED), f"MODEL {NOTHING}"),
    (("score", "{model}", "rows.jsonl", *SCORED), "data set 'rows.jsonl': no such file"),
    (("soup", "./none", "./none", "--out", "x"), f"model 1 {NOTHING}"),
    (("soup", "./none", "--out", "x"), "a soup of 1 models and 0 weights"),
    (("tiny-model", "--task", "gsm8k_calculator"), "gsm8k_calculator needs GSM8K's train file"),
    (("report", "none"), "none holds no metrics.jsonl; give the folder of a run"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    MISTAKES,
    ids=[f"{words[0]}-{number}" for number, (words, _) in enumerate(MISTAKES)],
)
def test_a_mistake_is_told_without_importing_torch(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Five seconds of imports lie between a mistake and its line otherwise."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    words = [word.format(model=tmp_path.parent, full=tmp_path / "full") for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "rltrain", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_data_set_of_ones_own_needs_no_options_of_the_task_it_replaces() -> None:
    recipe = recipe_of(GRPO, "data.train=own.jsonl")
    assert recipe.data.options == {}
    assert recipe_of(GRPO, "data.train=arithmetic").data.options.keys() == {
        *("digits", "operations", "question")
    }
    both = ("data.options={digits: 3}", "data.train=arithmetic_pairs")
    assert recipe_of(GRPO, *both).data.options == {"digits": 3}


def test_a_prompt_beyond_the_engines_window_is_told_before_weights_are_loaded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    MistralConfig(**sizes, sliding_window=24).save_pretrained(tmp_path)
    recipe = recipe_of(GRPO, f"model.path={tmp_path}", "rollout.max_tokens=8")
    short = Prompt("short", tuple(range(16)), "")
    require_decodable(recipe, [short])
    with pytest.raises(UserError, match=r"prompt 'long' has 17 tokens .* 24 of the sliding .* to 16 or less"):
        require_decodable(recipe, [short, Prompt("long", tuple(range(17)), "")])
