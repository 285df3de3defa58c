"""The memory that every step reports, and the comparisons that must not read it."""

import json

import pytest
import torch

from rltrain.report.memory import memory_metrics
from rltrain.report.names import check_names, reproducible_metrics
from rltrain.report.reporter import Reporter
from rltrain.report.sinks import JsonLines, Sinks


def test_memory_is_what_the_process_holds_in_gib() -> None:
    before = memory_metrics()
    held = torch.zeros(2**26)  # 256 MiB, written
    after = memory_metrics()
    check_names(after)
    assert after["memory/process"] - before["memory/process"] == pytest.approx(0.25, abs=0.1)
    assert after["memory/process_peak"] >= after["memory/process"] - 0.02 > 0
    assert held.sum() == 0
    del held
    assert memory_metrics()["memory/process_peak"] >= after["memory/process_peak"]


def test_with_a_gpu_its_memory_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sizes = {"memory_allocated": 1, "memory_reserved": 3, "max_memory_allocated": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size * 2**30)
    metrics = memory_metrics()
    check_names(metrics)
    assert {name: value for name, value in metrics.items() if "gpu" in name} == {
        "memory/gpu_allocated": 1.0,
        "memory/gpu_reserved": 3.0,
        "memory/gpu_peak": 2.0,
    }


def test_every_step_has_its_memory_and_comparisons_leave_it_out(tmp_path) -> None:
    reporter = Reporter(Sinks(JsonLines(tmp_path / "m.jsonl"), {}, pytest.fail), None, None)
    reporter.step(1, {"reward/mean": 0.5, "time/step": 1.0}, (), None)
    reporter.close()
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert line["memory/process"] > 0
    assert reproducible_metrics(line) == {"step": 1, "reward/mean": 0.5}
