"""Every mistake a user can make is one line, exit code 2, before any weight is loaded, and touches no
folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rltrain.build import rollout
from rltrain.cli import app as cli
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.learner import frozen_models, trained_model
from support.architectures import ORIGINAL_CONTEXT, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(
    random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """``train("a.b=1", ...)`` runs ``rltrain train`` in this process and returns what it printed to
    stderr.
    """

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    # Imported above, before any call: a module imported under the substitute would keep it for other tests.
    for module in (trained_model, frozen_models, rollout):
        monkeypatch.setattr(module, "load_causal_lm", loaded)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"

    def call(*overrides: str, run: Path = run, recipe: str = "grpo", resume: str = "auto") -> str:
        settings = [f"model.path={random_model}", "reward.seconds=5", *overrides]
        arguments = [
            "train",
            str(ROOT / f"recipes/policy/{recipe}.yaml"),
            "--profile",
            "tiny_cpu",
            "--run",
            str(run),
            "--resume",
            resume,
        ]
        monkeypatch.setattr(
            sys,
            "argv",
            ["rltrain", *arguments, *(word for setting in settings for word in ("--set", setting))],
        )
        before = sorted(path for path in tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert sorted(path for path in tmp_path.rglob("*")) == before, "something was written"
        return capsys.readouterr().err

    return call


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.policy.name=clipp", r"no policy loss is called 'clipp'; did you mean 'clip'?"),
        ("rollout.promts=3", "did you mean 'rollout.prompts'"),
        ("rollout.n=1", "rollout.n is 1"),
        ("learner.updates=100", "learner.updates is 100"),
        ("learner.tokens_per_micro_batch=4", "tokens_per_micro_batch is 4"),
        ("rollout.max_tokens=600", "reads at most 512"),
        ("model.path=nowhere/at-all", "model.path 'nowhere/at-all' is no model folder"),
        ("reward.functions=[missing.py:score]", "missing.py"),
        ("rollout.prompts=100000", "a step needs 100000 different prompts"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_wrong_key_names_the_key_and_the_remedy(train, override: str, said: str) -> None:
    if override.startswith("rollout.max_tokens"):
        message = train(override, "learner.tokens_per_micro_batch=8192")
    elif override.startswith("data.train"):
        message = train(override, "data.options={}", "data.eval=null")
    else:
        message = train(override)
    assert said in message
    assert message.startswith("error: ")


def test_data_is_refused_with_file_line_and_columns(train, tmp_path: Path) -> None:
    options = ("data.options={}", "data.eval=null", "rollout.prompts=1")
    wrong_column = jsonl(tmp_path / "a.jsonl", {"question": "1+1="})
    assert "there are ['question']" in train(f"data.train={wrong_column}", *options)
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n')
    assert "line 2" in train(f"data.train={broken}", *options)
    empty = tmp_path / "c.jsonl"
    empty.write_text("")
    assert "empty" in train(f"data.train={empty}", *options)
    long = jsonl(tmp_path / "d.jsonl", {"prompt": "1+" * 40, "answer": "2"})
    assert "data.max_prompt_tokens is 16" in train(f"data.train={long}", *options)


def test_a_missing_answer_column_is_found_on_the_first_sample(train, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "1+1=", "solution": "2"})
    message = train(f"data.train={data}", "data.options={}", "data.eval=null", "rollout.prompts=1")
    assert "answer" in message
    assert "solution" in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def score(inputs):\n    return [float('nan')] * len(inputs.completions)\n", "nan"),
        ("def score(inputs):\n    raise KeyError('gold')\n", "gold"),
        ("import does_not_exist\ndef score(inputs):\n    return [0.0]\n", "does_not_exist"),
    ],
)
def test_a_reward_that_cannot_work_is_found_before_the_run(
    train, tmp_path: Path, body: str, message: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(body)
    assert message in train(f"reward.functions=['{path}:score']")


def test_a_tokenizer_without_eos_is_refused(train, random_model: str, tmp_path: Path) -> None:
    model_folder = tmp_path / "bare"
    shutil.copytree(random_model, model_folder)
    (model_folder / "generation_config.json").unlink()
    for name in ("tokenizer_config.json", "config.json"):
        settings = json.loads((model_folder / name).read_text())
        settings.update({key: None for key in ("eos_token", "eos_token_id") if key in settings})
        (model_folder / name).write_text(json.dumps(settings))
    assert "has no EOS token" in train(f"model.path={model_folder}")


def test_a_run_folder_with_anything_in_it_is_left_alone(train, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "thesis.tex").write_text("precious")
    assert "thesis.tex" in train(run=run)
    assert (run / "thesis.tex").read_text() == "precious"
    (run / "thesis.tex").unlink()
    (run / "recipe.resolved.yaml").write_text("seed: 0\n")
    assert "already holds a run, whose recipe cannot be read" in train(run=run)
    assert "already holds a run; choose another --run, or continue it" in train(run=run, resume="never")
    (run / "recipe.resolved.yaml").write_text(
        resolved_yaml(load_recipe(ROOT / "recipes/policy/dapo.yaml", profile="tiny_cpu"))
    )
    message = train(run=run)
    assert "was written by another recipe" in message
    assert (
        'error: advantage.name: "group_norm" -> "' in message
        or "error: rollout.dynamic_sampling: " in message
    )
    assert "no complete checkpoint" in train(run=tmp_path / "new", resume=str(run))
    file = tmp_path / "file"
    file.write_text("x")
    assert "file" in train(run=file)


# model folders ----------------------------------------------------------------------------------------------


def with_weights(model: str, out: Path, keep: Callable[[str], bool]) -> Path:
    """A copy of the folder with the tensors that ``keep`` names."""
    shutil.copytree(model, out)
    tensors = {name: tensor for name, tensor in load_file(out / "model.safetensors").items() if keep(name)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_folder_without_some_of_its_tensors(train, random_model: str, tmp_path: Path) -> None:
    folder = with_weights(random_model, tmp_path / "model", lambda name: ".layers.1." not in name)
    assert "12 missing (model.layers.1.input_layernorm.weight" in train(f"model.path={folder}")


@pytest.mark.parametrize("key", ["model.reference", "model.teacher"])
def test_a_second_model_without_some_of_its_tensors(
    train, key: str, random_model: str, tmp_path: Path
) -> None:
    folder = with_weights(random_model, tmp_path / "model", lambda name: name != "model.norm.weight")
    assert "1 missing (model.norm.weight)" in train(f"{key}={folder}")


def test_a_reward_model_that_is_a_language_model(train, random_model: str) -> None:
    said = train(f"reward.functions=[{{name: reward_model, path: {random_model}}}]")
    assert "has no score.weight: it is a language model" in said


def test_a_folder_without_its_tokenizer(train, random_model: str, tmp_path: Path) -> None:
    shutil.copytree(random_model, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    said = train(f"model.path={tmp_path / 'model'}")
    assert "example 100% of '<user>" in said and "has 6 tokens; is its tokenizer.json" in said


def test_a_tokenizer_larger_than_the_embedding(train, random_model: str, tmp_path: Path) -> None:
    shutil.copytree(random_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "model")
    said = train(f"model.path={tmp_path / 'model'}")
    assert "its tokenizer has 102 tokens and its embedding 101 rows" in said


def test_prompts_in_a_script_that_the_tokenizer_does_not_know(train, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1=", "answer": "2"},
        *({"prompt": f"\u4e2d\u6587{number}", "answer": "1"} for number in range(9)),
    ]
    data = jsonl(tmp_path / "data.jsonl", *rows)
    said = train(f"data.train={data}", "data.options={}", "data.eval=null", "data.max_prompts=null")
    assert "data.jsonl: " in said and "of the texts is lost between text and token ids" in said


@pytest.mark.parametrize(
    "sizes", [("data.max_prompt_tokens=12", "rollout.max_tokens=5"), ("rollout.max_tokens=16",)]
)
def test_rows_beyond_the_length_where_rotary_frequencies_change(
    train, sizes: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tiny("phi3_longrope", tmp_path / "longrope")
    said = train(f"model.path={folder}", *sizes)
    assert f"reads at most {ORIGINAL_CONTEXT} (its original context: rope_type longrope" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in float16")
def test_float16_without_a_gpu(train) -> None:
    assert "learner.precision is float16 and there is no GPU" in train("learner.precision=float16")
