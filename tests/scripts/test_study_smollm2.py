"""What scripts/study_smollm2.py keeps, skips and writes, on runs that are written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support import scripts as script_modules


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_modules.script("study_smollm2")


@pytest.fixture
def kept(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results and pages of the study go here."""
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "PAGES", tmp_path)
    (tmp_path / "figures").mkdir()
    page = f"# Title\n\n{script.BEGIN}\nold\n{script.END}\n\nText.\n"
    (tmp_path / "smollm2_entropy.md").write_text(page)
    return tmp_path / "smollm2_entropy.json"


def run(method: str, seed: int, last: float, pass_at_1: float, **others: Any) -> dict[str, Any]:
    """Four steps whose entropy falls from 2 to ``last``."""
    steps = {
        "step": [1, 2, 3, 4],
        "learner/entropy_mean": [2.0, last, last, last],
        "reward/mean": [0.1, 0.2, None, 0.4],
        "loss/clip_low": [0.01, 0.01, None, 0.02],
        "loss/clip_high": [0.0, 0.0, 0.0, 0.0],
        "rollout/completions": [8, 8, 8, 8],
        "time/step": [1.0, 1.0, 1.0, 1.0],
    }
    evals = {"step": [0, 4], "eval/pass@1": [0.2, pass_at_1], "eval/pass@8": [None, 0.9]}
    numbers = {"peak_gib": 2.0, "recipe": "", "steps": steps, "evals": evals}
    return {"method": method, "seed": seed, **numbers, **others}


def test_all_methods_of_a_seed_come_first_and_kept_runs_are_skipped(script: ModuleType):
    study = script.STUDIES["preferences"]
    runs = [{"seed": 0, "method": "kto"}, {"seed": 1, "method": "dpo"}]
    pending = script.pending_runs(study, runs, 2)
    assert pending == [
        *[(0, method) for method in ("dpo", "h_dpo_0.8", "h_dpo_1.2", "mmpo")],
        *[(1, method) for method in ("h_dpo_0.8", "h_dpo_1.2", "kto", "mmpo")],
    ]
    assert script.pending_runs(study, [*runs, *({"seed": s, "method": m} for s, m in pending)], 2) == []


@pytest.mark.parametrize("name", ["entropy", "preferences"])
def test_every_recipe_of_a_folder_is_a_method_of_its_study(script: ModuleType, name: str):
    study = script.STUDIES[name]
    recipes = (script.RECIPES / study.folder).glob("*.yaml")
    assert sorted(path.stem for path in recipes) == sorted(study.methods)


def test_the_table_pairs_seeds_and_gives_no_interval_from_one(script: ModuleType):
    runs = [run("grpo", 0, 0.2, 0.5), run("grpo", 1, 0.4, 0.7), run("aepo", 1, 1.0, 0.6)]
    header, _, grpo, aepo = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in script.draw_table(script.STUDIES["entropy"], runs).splitlines()
    )
    cells = dict(zip(header, grpo, strict=True))
    assert cells["seeds"] == "2"
    assert cells["last steps, nats"] == "0.300 [-0.971, 1.571]"  # 0.1 sqrt 2 / sqrt 2 times 12.706
    assert cells["held-out pass@1"] == "0.600 [0.000, 1.000]"  # a share stays one
    assert cells["tokens clipped"].startswith("0.0100")
    place = header.index("last steps, nats")
    assert aepo[1] == "1" and aepo[place : place + 2] == ["1.000", "0.600"]
    assert grpo[place + 1] == "-"  # not less itself


def test_a_page_is_written_from_what_is_kept_without_a_run(
    script: ModuleType, kept: Path, capsys: pytest.CaptureFixture[str]
):
    script.write_kept(kept, [run("grpo", 0, 0.2, 0.5), run("kl_cov", 0, 0.4, 0.7)])
    assert len(kept.read_text().splitlines()) == 4  # a line for each run
    script.main(["entropy", "--minutes", "0", "--seeds", "1"])
    assert capsys.readouterr().out == "smollm2_entropy.json: 7 runs left\n"
    text = (kept.parent / "smollm2_entropy.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nText.\n") and "old" not in text
    assert "| kl_cov | 1 |" in text
    assert (kept.parent / "figures" / "smollm2_entropy.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_kept_with_its_curves_and_loses_its_weights(
    script: ModuleType, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained: list[str] = []

    def write_run(command: list[str]) -> None:
        folder = Path(command[command.index("--run") + 1])
        (folder / "model").mkdir(parents=True)
        trained.append(folder.parent.name)
        lines = [
            {"step": 0, "eval/pass@1": 0.25, "eval/pass@1_low": 0.1},
            {"step": 1, "time/step": 30.0, "learner/entropy_mean": 1.234567, "memory/process_peak": 3.5},
            {"step": 1, "eval/pass@1": 0.5},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(script, "run_command", write_run)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    script.write_kept(kept, [run("grpo", 0, 0.2, 0.5, recipe=script.digest_of_recipe(grpo_recipe(script)))])
    script.main(["entropy", "--model", str(model), "--out", str(tmp_path / "runs"), "--seeds", "1"])
    assert trained == list(script.STUDIES["entropy"].methods[1:])
    runs = script.read_kept(kept)
    assert [finished["method"] for finished in runs] == list(script.STUDIES["entropy"].methods)
    assert runs[1]["steps"] == {"learner/entropy_mean": [1.2346], "step": [1], "time/step": [30]}
    assert runs[1]["evals"] == {"eval/pass@1": [0.25, 0.5], "step": [0, 1]}
    assert runs[1]["peak_gib"] == 3.5
    assert script.curves_of(runs[1]).final("eval/pass@1").value == 0.5
    assert not list((tmp_path / "runs").rglob("model"))


def grpo_recipe(script: ModuleType) -> Path:
    return script.STUDIES["entropy"].recipe("grpo")


def test_runs_of_another_recipe_or_of_other_pairs_are_not_mixed(script: ModuleType):
    study = script.STUDIES["entropy"]
    grpo = {"method": "grpo", "seed": 0, "recipe": script.digest_of_recipe(grpo_recipe(script)), "data": "a"}
    script.require_same_conditions(study, [grpo], 0, "a")
    script.require_same_conditions(study, [grpo], 1, "b")
    with pytest.raises(SystemExit, match=r"grpo, seed 0, .* learned from other pairs"):
        script.require_same_conditions(study, [grpo], 0, "b")
    with pytest.raises(SystemExit, match=r"grpo, seed 0, .* is of another recipe"):
        script.require_same_conditions(study, [grpo | {"recipe": "old"}], 0, None)
