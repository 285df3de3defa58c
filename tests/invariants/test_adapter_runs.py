"""Runs that train an adapter: resumed exactly, equal on every backend, and taken over by full training."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rltrain.build.exported import export_run
from rltrain.checkpoint.run_state import is_sharded, read_state
from rltrain.cli.soup import soup_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.learner.loading import load_causal_lm
from rltrain.report.names import reproducible_metrics
from support.launch import run_ranks

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "model.adapter={rank: 4, alpha: 8}",
    "learner.optimizer.lr=1e-3",
    "learner.optimizer.eps=1e-5",
    "learner.optimizer.max_grad_norm=0.5",
    "learner.tokens_per_micro_batch=128",
    "train.examples=12",
    "train.steps=4",
    "train.deadline_seconds=120",
    "checkpoint.every=2",
    "reference.cache=null",
    "data.eval=null",
    "data.max_examples=48",  # all of them get log-probs of the reference before the first step
)
PARTS = "checkpoint.format=sharded"
pytestmark = pytest.mark.slow


def train(recipe: str, folder: Path, overrides: list[str], resume: str = "never") -> None:
    loaded = load_recipe(ROOT / f"recipes/{recipe}.yaml", profile="tiny_cpu", overrides=overrides)
    assert train_command(check(loaded).recipe, folder, [], resume) == 0


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lines_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [reproducible_metrics(line) for line in lines]


@pytest.fixture(scope="module")
def single_process(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter-alone") / "dpo"
    train("preference/dpo", folder, [f"model.path={random_model}", *SETTINGS])
    return folder


def test_a_resumed_run_continues_bit_for_bit(single_process: Path, random_model: str, tmp_path: Path) -> None:
    middle = single_process / "checkpoints/step-2"
    train("preference/dpo", tmp_path / "resumed", [f"model.path={random_model}", *SETTINGS], str(middle))
    assert len(lines_of(tmp_path / "resumed")) == 2
    require_same_end(tmp_path / "resumed", single_process)


QUANTIZED = "model.adapter={rank: 4, alpha: 8, quantize: nf4}"


@pytest.mark.parametrize(
    "storage",
    [
        "none",
        pytest.param(
            "nf4",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("bitsandbytes") is None,
                reason="bitsandbytes is not installed (pip install 'rltrain[qlora]')",
            ),
        ),
    ],
)
def test_a_run_in_parts_continues_bit_for_bit_and_is_exported(
    storage: str, random_model: str, tmp_path: Path
) -> None:
    overrides = [f"model.path={random_model}", *SETTINGS, PARTS]
    if storage == "nf4":
        overrides.append(QUANTIZED)
    run = tmp_path / "run"
    train("preference/dpo", run, overrides)
    middle = run / "checkpoints/step-2"
    assert is_sharded(middle)
    trained = {key.split("/")[0] for key in read_state(middle).tensors}
    assert trained and all(".lora_" in name for name in trained)  # neither base nor its moments
    train("preference/dpo", tmp_path / "resumed", overrides, str(middle))
    require_same_end(tmp_path / "resumed", run)

    out = export_run(run, tmp_path / "exported", "step-4", "float32")
    assert_equal_adapters(out, run / "model")
    for name in ("adapter_config.json", "adapter_base.json"):
        assert (out / name).exists() == (run / "model" / name).exists()
    expected = load_causal_lm(str(run / "model"), None, "auto").state_dict()
    exported = load_causal_lm(str(out), None, "auto").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in exported.items())


def require_same_end(run: Path, expected_run: Path) -> None:
    """The steps that both have, and the adapter, bit for bit."""
    lines = lines_of(run)
    assert lines and lines == lines_of(expected_run)[-len(lines) :]
    assert_equal_adapters(run / "model", expected_run / "model")


def assert_equal_adapters(folder: Path, expected_folder: Path) -> None:
    expected = adapter_of(expected_folder)
    actual = adapter_of(folder)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in actual.items())


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_equal_one(backend: str, single_process: Path, random_model: str, tmp_path: Path) -> None:
    overrides = [f"model.path={random_model}", *SETTINGS]
    runs = [{"recipe": "recipes/preference/dpo.yaml", "name": "dpo", "overrides": overrides}]
    if backend in ("ddp", "fsdp2") and importlib.util.find_spec("bitsandbytes"):
        quantized = [*overrides, QUANTIZED, "train.steps=2"]
        runs.append({"recipe": "recipes/preference/dpo.yaml", "name": "nf4", "overrides": quantized})
        train("preference/dpo", tmp_path / "nf4", quantized)
    out = tmp_path / "ranks"
    out.mkdir()
    in_parts = {**runs[0], "overrides": [*overrides, PARTS]}
    runs.append({**in_parts, "name": "parts"})
    runs.append({**in_parts, "name": "from_parts", "resume": str(out / "parts/checkpoints/step-2")})
    (out / "runs.json").write_text(json.dumps(runs))
    run_ranks(backend, [str(Path(__file__).with_name("two_ranks_preferences.py")), str(out)])

    assert is_sharded(out / "parts/checkpoints/step-2")
    require_same_end(out / "parts", out / "dpo")
    assert len(lines_of(out / "from_parts")) == 2
    require_same_end(out / "from_parts", out / "parts")
    for run, expected in (("dpo", single_process), ("nf4", tmp_path / "nf4")):
        if not expected.exists():
            continue
        for line, want in zip(lines_of(out / run), lines_of(expected), strict=True):
            for name in ("loss/total", "learner/grad_norm"):
                assert line[name] == pytest.approx(want[name], rel=1e-3, abs=5e-6), (run, line["step"], name)
        weights = adapter_of(out / run / "model")
        expected_weights = adapter_of(expected / "model")
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            assert (weight - expected_weights[name]).abs().max() < 2e-5, (run, name)


def test_full_training_takes_an_adapter_over_and_a_merged_model_is_the_same(
    single_process: Path, tmp_path: Path
) -> None:
    adapter = str(single_process / "model")
    assert soup_command([adapter], [], tmp_path / "merged") == 0
    assert soup_command([adapter, adapter], [], tmp_path / "soup") == 0
    expected = load_causal_lm(adapter, None, "auto").state_dict()
    for folder in ("merged", "soup"):
        merged = load_causal_lm(str(tmp_path / folder), None, "auto").state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())

    full = ["model.adapter=null", "train.steps=1", "learner.optimizer.lr=0"]
    train("preference/dpo", tmp_path / "full", [f"model.path={adapter}", *SETTINGS, *full])
    taken_over = load_causal_lm(str(tmp_path / "full/model"), None, "auto").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in taken_over.items())
    overrides = [f"model.path={tmp_path / 'full/model'}", *SETTINGS, "train.steps=1"]
    train("preference/dpo", tmp_path / "again", overrides)
    assert (tmp_path / "again/model/adapter_config.json").is_file()
