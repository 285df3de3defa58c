"""Ranks that wait for one another outside of a collective."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
RANK = """
import sys
from rltrain.learner.ranks import meet_ranks
for number in range(2):
    meet_ranks(2)
    print(number, flush=True)
    sys.stdin.readline()
"""


def test_a_meeting_ends_when_the_last_rank_has_come() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    environment = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start() as first:
        key = "rltrain/meeting/0"
        until = time.monotonic() + 120
        while store.add(key, 0) < 1 and time.monotonic() < until:
            time.sleep(0.02)
        assert store.add(key, 0) == 1 and first.poll() is None
        with start() as second:
            for number in range(2):
                for process in (first, second):
                    assert process.stdout is not None and process.stdin is not None
                    assert process.stdout.readline() == f"{number}\n"
                for process in (first, second):
                    assert process.stdin is not None
                    process.stdin.write("\n")
                    process.stdin.flush()
            assert (first.wait(60), second.wait(60)) == (0, 0)
