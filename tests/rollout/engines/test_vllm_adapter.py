"""Adapters on vLLM in the learner's process: proved at every push, and equal to peft."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rltrain.build.workflows import WORKFLOWS
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.learner.loading import load_causal_lm
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.types.samples import REFERENCE_VERSION

ROOT = Path(__file__).parents[3]
REWARD = """
from rltrain.reward.score import Score

def odd(inputs):
    shares = [sum(ord(letter) % 2 for letter in text) / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.5)}) for share in shares]
"""
# an odd rank, which vLLM pads, on some layers of a fused one
FORMS = {
    "none": "rank: 4, alpha: 8, rslora: true",
    "nf4": "rank: 6, alpha: 12, targets: [q_proj, v_proj, up_proj]",
}
CHECKED = {"none": 2 * 7 * 2, "nf4": 2 * 3 * 2}  # A and B of every layer, at the least
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'rltrain[qlora]')",
)
PROBE = tuple(range(5, 25))
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_grpo_with_an_adapter_is_proved_at_every_push(
    quantize: str, random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(REWARD)
    overrides = [
        f"model.path={random_model}",
        f"model.adapter={{quantize: {quantize}, {FORMS[quantize]}}}",
        "learner.optimizer.lr=1e-3",
        "rollout.engine=vllm",
        f"reward.functions=['{tmp_path / 'odd.py'}:odd']",
        "rollout.prompts=4",
        "rollout.n=4",
        "train.steps=3",
        "data.eval=null",
    ]
    recipe = check(
        load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=overrides)
    ).recipe
    online = WORKFLOWS["online"]
    runs: list[Any] = []
    monkeypatch.setitem(WORKFLOWS, "online", _recording(online, runs))
    assert train_command(recipe, tmp_path / "run", [], "never") == 0

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["sync/difference"] == 0 for line in lines)
    assert all(line["sync/checked"] >= CHECKED[quantize] and line["sync/probe"] < 1e-5 for line in lines)
    assert all(line["rollout/mismatch_abs"] < 1e-5 for line in lines)
    _check_last_run(runs[0], random_model, tmp_path / "run/model")


def _recording(workflow: Any, runs: list[Any]) -> Any:
    def build(*arguments: Any) -> Any:
        run = workflow.build(*arguments)
        engine = run.sync.targets[0]
        close = run.source.close
        # some sources are frozen
        object.__setattr__(run.source, "close", lambda: (runs.append(_use_engine(run, engine)), close()))
        return run

    return dataclasses.replace(workflow, build=build)


def _use_engine(run: Any, engine: Any) -> dict[str, Any]:
    """Numbers of the engine before it closes, and of faults that are planted in it."""
    learner = run.learner
    numbers: dict[str, Any] = {"before": engine.prompt_log_probs(PROBE)[0]}
    numbers["base"] = {name: weight.clone() for name, weight in learner.trained.base_model_weights()}
    folder = Path(engine._adapter.lora_path)
    numbers["folders"] = [path.name for path in folder.parent.iterdir()]
    engine._llm.collective_rpc(_shift_adapter)
    with pytest.raises(WeightMismatchError, match=r"lora_A\.weight"):
        run.sync.verify()
    run.sync.push(learner.adapter_weights, learner.version, expect_change=False)
    numbers["again"] = engine.prompt_log_probs(PROBE)[0]
    with run.sync.switch_off(REFERENCE_VERSION, learner.adapter_weights):
        numbers["off"] = engine.prompt_log_probs(PROBE)[0]
    numbers["after"] = engine.prompt_log_probs(PROBE)[0]
    numbers["id"] = engine._adapter.lora_int_id
    engine._adapter = None  # the adapter is held, but no request names it
    with pytest.raises(WeightMismatchError, match="adapter"):
        run.sync.verify()
    return numbers


def _shift_adapter(worker: Any) -> None:
    manager = worker.model_runner.lora_manager._adapter_manager
    layer = next(iter(manager.modules.values()))
    layer.lora_a_stacked[0][:, 0, 0, 0] += 1e-3


def _check_last_run(numbers: dict[str, Any], base_path: str, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_path)
    base.load_state_dict(numbers["base"])  # of a quantised base, what its storage made of the weights

    def log_probs(model: Any) -> list[float]:
        ids = torch.tensor([PROBE])
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0, :-1]
        return logp.gather(1, ids[0, 1:, None])[:, 0].tolist()

    assert numbers["off"] == pytest.approx(log_probs(base), abs=1e-5)
    by_peft = log_probs(PeftModel.from_pretrained(base, str(folder)))
    for state in ("before", "again", "after"):
        assert numbers[state] == pytest.approx(by_peft, abs=1e-5), state
    assert numbers["before"] != pytest.approx(numbers["off"], abs=1e-3)
    assert log_probs(load_causal_lm(str(folder), None, "auto")) == pytest.approx(by_peft, abs=1e-5)
    assert len(numbers["folders"]) == 1 and numbers["id"] == 6  # one folder at a time, each load a new name
