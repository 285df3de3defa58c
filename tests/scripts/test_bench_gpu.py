"""scripts/bench_gpu.py at toy sizes on a CPU: every section runs, reports, and stops in time."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.scripts import SCRIPTS

SECTIONS = ("head", "body", "share", "learner", "engine", "prints", "sleep", "mismatch")


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("bench_gpu")


@pytest.fixture(scope="module")
def bench(module: ModuleType) -> Iterator[Any]:
    bench = module.Bench(module.TINY, "cpu")
    yield bench
    bench.close()


def test_the_sections_are_those_of_the_help(module: ModuleType) -> None:
    assert tuple(module.SECTIONS) == SECTIONS
    assert module.SECTION_SECONDS < 240
    assert all(f"\n{name}: " in module.__doc__ for name in SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_runs_on_a_cpu(module: ModuleType, bench: Any, name: str) -> None:
    count = len(bench.results)
    assert module.run_section(bench, name)
    results = bench.results[count:]
    assert results
    assert {result["section"] for result in results} == {name}
    assert not [result for result in results if "error" in result]


def test_the_head_agrees_with_the_naive_form(module: ModuleType) -> None:
    bench = module.Bench(module.TINY, "cpu")
    module.run_section(bench, "head")
    others = [result for result in bench.results if "form" in result]
    assert [result["form"] for result in others].count("naive") == 2
    assert all(result["gradient_difference"] < 0.02 for result in others)  # bfloat16


def test_mismatch_is_measured_with_both_heads(module: ModuleType, bench: Any) -> None:
    module.run_section(bench, "mismatch")
    results = [result for result in bench.results if result["what"] == "mismatch"][-2:]
    assert [result["fp32_head"] for result in results] == [False, True]
    assert all(0 < result["mean"] < 0.05 for result in results)  # bfloat16 body against a float32 engine


def test_a_section_that_fails_is_reported_and_costs_itself_only(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(bench: Any) -> None:
        raise RuntimeError("no kernel image")

    bench = module.Bench(module.TINY, "cpu")
    monkeypatch.setitem(module.SECTIONS, "head", break_down)
    assert not module.run_section(bench, "head")
    assert "no kernel image" in bench.results[-1]["error"]


def test_a_section_stops_when_its_time_is_over(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = module.Bench(module.TINY, "cpu")
    monkeypatch.setattr(module, "SECTION_SECONDS", 0.0)
    assert module.run_section(bench, "head")
    assert len(bench.results) == 1


def test_the_report_has_machine_and_versions(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", "--tiny", "--json", str(file), "head"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    report = json.loads(file.read_text())
    assert report["tiny"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(report["results"]) >= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_toy_sizes_are_measured(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert "torch finds no CUDA GPU; --tiny" in capsys.readouterr().err
