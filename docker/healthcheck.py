"""Health of a container: exit code 0 if it is well, 1 with one line if not.

python healthcheck.py run     metrics.jsonl of the run in $RLTRAIN_RUN grew within $RLTRAIN_SILENCE_SECONDS,
                              or its model is written
python healthcheck.py worker  the server at $RLTRAIN_URL answers /health
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def check_run(folder: Path, longest: float) -> str | None:
    """What is wrong with the run in ``folder``; None: nothing. longest: seconds without a line."""
    if (folder / "model").is_dir():
        return None
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return f"{metrics} is not there yet"
    silent = time.time() - metrics.stat().st_mtime
    return None if silent <= longest else f"{metrics} has not grown for {silent:.0f} s"


def check_worker(url: str) -> str | None:
    """What is wrong with the worker at ``url``; None: nothing."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=4):
            return None
    except (urllib.error.URLError, OSError) as error:
        return f"{url}/health: {error}"


def main() -> int:
    if sys.argv[1:] == ["run"]:
        longest = float(os.environ.get("RLTRAIN_SILENCE_SECONDS", "3600"))
        problem = check_run(Path(os.environ.get("RLTRAIN_RUN", "/runs/run")), longest)
    elif sys.argv[1:] == ["worker"]:
        problem = check_worker(os.environ.get("RLTRAIN_URL", "http://127.0.0.1:8000"))
    else:
        problem = "usage: healthcheck.py run|worker"
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
