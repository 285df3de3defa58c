"""Every test that docs/mistakes.md names exists, and its times are those of the kept measurement."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/mistakes.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_the_times_are_those_that_were_measured() -> None:
    results = json.loads((ROOT / "scripts/results/mistakes.json").read_text(encoding="utf-8"))["mistakes"]
    assert len(results) == 10 and all(result["fine"] for result in results.values())
    for mistake, result in results.items():
        assert f"| {mistake} | `{result['command']}` | {result['cpu_seconds']:.2f} |" in PAGE
