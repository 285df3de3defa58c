"""The benchmark of a pool runs, at a small size, and its numbers are of what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.scripts import SCRIPTS


def test_every_row_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ["--completions", "80", "--in-flight", "160", "--liveness", "0.5"]
    subprocess.run([sys.executable, SCRIPTS / "bench_server.py", *sizes, "--json", out], check=True)
    results = json.loads(out.read_text())
    assert results["in_flight"] == 160
    assert 8 < results["bytes_per_token"] < 12
    assert results["completions_per_s"] > 0 and results["completions_per_cpu_s"] > 0
    assert results["kill_to_redispatch_s"] > 0 and results["stop_to_redispatch_s"] >= 0.4  # one deadline
