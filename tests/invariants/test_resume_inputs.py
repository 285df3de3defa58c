"""A run goes on with the code, the answers and the date with which it began, or not at all."""

from __future__ import annotations

import datetime as dt
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rltrain.build import digests as build_inputs
from rltrain.chat_template import frozen_clock, prints_date
from rltrain.checkpoint.manifest import MANIFEST, file_hashes
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.errors import UserError
from support.resumed_runs import ROOT, lines, train_here

QUICK = (
    "checkpoint.every=1",
    "rollout.prompts=2",
    "rollout.n=2",
    "rollout.dynamic_sampling=null",
    "learner.updates=1",
    "eval.every=0",
)
LENGTH = (
    "learner.optimizer.schedule=constant",
    "learner.optimizer.warmup_steps=0",
    "data.max_prompts=null",
    "data.options={}",
)
GRPO = ROOT / "recipes/policy/grpo.yaml"
REWARD = "def f(completions, **columns):\n    return [float('1' in text) for text in completions]\n"


@pytest.fixture
def start(random_model: str, tmp_path: Path) -> Any:
    rows = [{"prompt": f"{number}+1=", "answer": str(number + 1), "level": 1} for number in range(10, 20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"prompt": f"{number}+1=", "answer": str(number + 1), "level": 1} for number in (3, 4)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (tmp_path / "own.py").write_text(REWARD)
    data = (f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/eval.jsonl")
    functions = f"reward.functions=['{tmp_path}/own.py:f', exact]"

    def call(*overrides: str, folder: str = "run", resume: str = "auto") -> int:
        settings = (*QUICK, *LENGTH, *data, functions, *overrides)
        return train_here(random_model, tmp_path / folder, *settings, resume=resume)

    return call


def replaced(path: Path, old: str, new: str) -> str:
    """What stood in the file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return text


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("own.py", "'1' in", "'2' in", r"code of reward.functions.0 \(.*own.py:f\): sha256:"),
        ("train.jsonl", '"answer": "11"', '"answer": "7"', "column answer of data.train: sha256:"),
        ("train.jsonl", '"level": 1', '"level": 2', "column level of data.train: "),
        ("eval.jsonl", '"answer": "4"', '"answer": "5"', "column answer of data.eval: "),
    ],
)
def test_other_code_or_answers_are_refused_by_name_and_nothing_is_touched(
    start: Any, tmp_path: Path, file: str, old: str, new: str, named: str
) -> None:
    assert start("train.steps=1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    original = replaced(tmp_path / file, old, new)
    with pytest.raises(UserError, match=named) as refused:
        start("train.steps=2")
    assert len(str(refused.value).splitlines()) == 2  # and nothing else is named
    with pytest.raises(UserError, match=named):
        start("train.steps=2", resume=str(tmp_path / "run/checkpoints/step-1"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / file).write_text(original)
    assert start("train.steps=2") == 0
    assert [
        line["step"]
        for line in lines(tmp_path / "run")
        if "learner/lr" in line or "learner/grad_norm" in line
    ] == [1, 2]


def test_a_checkpoint_without_digests_goes_on_and_says_so(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("train.steps=1") == 0
    checkpoint = tmp_path / "run/checkpoints/step-1"
    state = json.loads((checkpoint / "training/state.json").read_text())
    assert state.pop("inputs")
    (checkpoint / "training/state.json").write_text(json.dumps(state))
    (checkpoint / MANIFEST).write_text(json.dumps(file_hashes(checkpoint)))
    assert start("train.steps=2") == 0
    assert "an older rltrain wrote it" in " ".join(capsys.readouterr().out.split())


# the date ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ '<user>' + strftime_now('%d.%m.%Y %H:%M:%S') }}{% for m in messages %}{{ m['content'] }}{% endfor "
    "%}<assistant>"
)


@pytest.fixture
def dated_model(random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "dated"
    shutil.copytree(random_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(build_inputs, "_today", lambda: dt.date(2031, 5, 1))
    return str(folder)


def prompts_of(run: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in (run / "transcripts.jsonl").read_text().splitlines()}


def test_a_run_keeps_its_date_on_another_day_and_says_it(
    start: Any,
    dated_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = functools.partial(start, f"model.path={dated_model}", "data.max_prompt_tokens=64")
    assert call("train.steps=1") == 0
    assert "the date in prompts is 2031-05-01 for the whole run (data.date)" in " ".join(
        capsys.readouterr().out.split()
    )
    monkeypatch.setattr(build_inputs, "_today", lambda: dt.date(2031, 5, 2))
    assert call("train.steps=2") == 0
    assert all("01.05.2031 00:00:00" in prompt for prompt in prompts_of(tmp_path / "run"))
    assert call("train.steps=2", resume=str(tmp_path / "run/checkpoints/step-1"), folder="fork") == 0
    assert all("01.05.2031" in prompt for prompt in prompts_of(tmp_path / "fork"))
    with pytest.raises(UserError, match=r'data.date: "2031-05-01" -> "2031-05-02"'):
        call("train.steps=3", "data.date=2031-05-02")


def test_a_template_without_a_date_leaves_the_recipe_alone(
    start: Any, random_model: str, tmp_path: Path
) -> None:
    assert not prints_date(random_model)
    assert start("train.steps=1") == 0
    assert "date: null" in (tmp_path / "run/recipe.resolved.yaml").read_text()


def test_the_clock_of_templates_stands_at_midnight() -> None:
    assert frozen_clock(dt.date(2026, 2, 3))["strftime_now"]("%Y-%m-%d %H:%M") == "2026-02-03 00:00"
    assert frozen_clock(None) == {}


def test_a_comparison_has_one_date(
    dated_model: str, random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, dated = (
        load_recipe(GRPO, profile="tiny_cpu", overrides=[f"model.path={path}"])
        for path in (random_model, dated_model)
    )
    assert build_inputs.common_date([plain, plain], tmp_path / "out") is None
    first = build_inputs.common_date([plain, dated], tmp_path / "out")
    assert first == dt.date(2031, 5, 1)
    RunFolder.create(tmp_path / "out/grpo/seed-0", resolved_yaml(build_inputs.with_prompt_date(dated)), {})
    monkeypatch.setattr(build_inputs, "_today", lambda: dt.date(2031, 5, 2))
    assert build_inputs.common_date([plain, dated], tmp_path / "out") == first
