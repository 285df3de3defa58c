"""README's tables of methods are what the declarations and recipes say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_methods_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/methods_table.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
