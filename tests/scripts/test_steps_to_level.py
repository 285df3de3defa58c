"""Steps to a level, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from support import scripts as script_modules


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_modules.script("steps_to_level")


def test_a_level_is_reached_on_the_straight_line_between_evaluations(script: ModuleType):
    steps = [0, 10, 20, 30]
    values = [0.4, 0.5, 0.45, 0.7]
    assert script.steps_to(steps, values, 0.45) == pytest.approx(5.0)
    assert script.steps_to(steps, values, 0.6) == pytest.approx(26.0)  # 0.15 of 0.25 after step 20
    assert script.steps_to(steps, values, 0.4) == 0.0
    assert script.steps_to(steps, values, 0.8) is None


def test_the_ratio_is_by_seed_and_says_who_never_got_there(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, seed, last in (("fast", 0, 0.9), ("fast", 1, 0.9), ("slow", 0, 0.65), ("slow", 1, 0.5)):
        folder = tmp_path / name / f"seed-{seed}"
        folder.mkdir(parents=True)
        lines = [
            {"step": 0, "eval/pass@1": 0.4},
            {"step": 1, "time/step": 1.0},
            {"step": 100, "eval/pass@1": last},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    script.main([str(tmp_path), "--levels", "0.6", "--against", "fast"])
    fast, slow = capsys.readouterr().out.splitlines()
    assert fast.endswith("fast     reached by 2 of 2 after 40.000 [40.000, 40.000] steps")
    assert slow.endswith("slow     reached by 1 of 2 after 80.000 steps, 2.000 times those of fast")
