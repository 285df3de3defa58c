"""A process that waits too long, or has lost a peer, ends with exit code 75 and says why.

Every case runs in a process of its own, which the watchdog ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rltrain.watchdog import EXPIRED
from support.patience import PATIENCE

ROOT = Path(__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    start = "import os, subprocess, sys, time\nfrom rltrain.watchdog import Watchdog\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", start + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_wait_beyond_its_deadline_names_what_and_whom_shows_the_stacks_and_takes_children_along() -> None:
    done = run("""
        def stuck_in_here():
            time.sleep(60)

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        with Watchdog(0.3, "rank 3") as watchdog:
            with watchdog.waiting("the vllm engine", "to generate 8 completions"):
                with watchdog.waiting("rank 0", "to answer"):
                    pass
                stuck_in_here()
    """)
    assert done.returncode == EXPIRED == 75
    assert "deadline: rank 3: waited 0 s for the vllm engine: to generate 8 completions" in done.stderr
    assert "stuck_in_here" in done.stderr
    for _ in range(100):  # an orphan is reaped by the process that adopts it
        if (
            not Path(f"/proc/{done.stdout.strip()}").exists()
            or "State:\tZ" in Path(f"/proc/{done.stdout.strip()}/status").read_text()
        ):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the child lives on")


def test_waits_that_end_in_time_and_time_that_nobody_waits_for_are_free() -> None:
    done = run("""
        with Watchdog(0.5) as watchdog:
            for _ in range(3):
                with watchdog.waiting("nobody", "to do anything"):
                    time.sleep(0.2)  # together longer than the deadline
            time.sleep(1.0)  # at work, for longer than the deadline
        print("came through")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "came through\n", "")


def test_a_wait_that_advances_may_last_and_ends_once_it_stands_still() -> None:
    done = run("""
        from rltrain.watchdog import note_progress

        with Watchdog(1.0) as watchdog, watchdog.waiting("the vllm engine", "to generate"):
            until = time.monotonic() + 4
            while time.monotonic() < until:
                note_progress()
                time.sleep(0.01)
            print("advanced", flush=True)
            time.sleep(60)
    """)
    assert (done.returncode, done.stdout) == (EXPIRED, "advanced\n")
    assert "for the vllm engine: to generate" in done.stderr


BOARD = """
    class Board:
        peers = (1,)
        status = "1 alive waiting for the engine: to start"
        def __init__(self):
            self.said = []
        def say(self, text):
            self.said.append(text)
        def read(self):
            return {1: self.status}
"""


def test_a_rank_without_a_sign_of_life_is_named_with_the_last_thing_it_did() -> None:
    done = run(BOARD + "\n    with Watchdog(1.5, 'rank 0', Board()):\n        time.sleep(60)")
    assert done.returncode == EXPIRED
    assert "deadline: rank 0: rank 1 gave no sign of life for 0." in done.stderr  # a third of 1.5 s
    assert "its last status was: waiting for the engine: to start" in done.stderr


def test_a_rank_that_advances_is_waited_for_and_one_that_only_lives_is_not() -> None:
    code = """
    import itertools
    class Board:
        peers = (1,)
        until = time.monotonic() + 4
        numbers = itertools.count()
        def say(self, text): pass
        def read(self):
            number = next(self.numbers)
            advanced = number if time.monotonic() < self.until else "all"
            return {1: f"{number}/{advanced} alive waiting for the engine: to generate"}
    start = time.monotonic()
    with Watchdog(1.0, "rank 0", Board()) as watchdog:
        watchdog.add_cleanup(lambda: print(time.monotonic() - start, flush=True))
        with watchdog.waiting("the other ranks", "to come here"):
            time.sleep(60)
    """
    done = run(code)
    assert done.returncode == EXPIRED and "for the other ranks: to come here" in done.stderr
    assert float(done.stdout) > 4


def test_a_rank_that_failed_ends_the_others_with_its_reason() -> None:
    code = BOARD.replace("1 alive waiting for the engine: to start", "7 gone NonFiniteError: lost") + (
        "\n    with Watchdog(600, 'rank 0', Board()):\n        time.sleep(600)"
    )
    start = time.monotonic()
    done = run(code)
    assert done.returncode == EXPIRED and "rank 1 failed: NonFiniteError: lost" in done.stderr
    assert time.monotonic() - start < PATIENCE


def test_a_rank_that_finished_is_not_missed_and_this_one_leaves_its_status() -> None:
    done = run(
        BOARD.replace("1 alive waiting for the engine: to start", "7 done -")
        + """
    board = Board()
    try:
        with Watchdog(0.6, 'rank 0', board):
            time.sleep(1)
            raise KeyError("the recipe")
    except KeyError:
        print(board.said[0], '|', board.said[-1].partition(' ')[2])
    """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1/0 alive at work | gone KeyError: 'the recipe'"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        ("TimeoutError('12 of 40 reward tasks')", "deadline: rank 0: 12 of 40 reward tasks"),
        (
            "__import__('rltrain.errors').errors.TemporaryError('no worker')",
            "deadline: rank 0: no worker",
        ),
        (
            "RuntimeError('[gloo] Timed out waiting 1800000ms for recv')",
            "Timed out waiting 1800000ms for recv; rank 1 was waiting for the engine",
        ),
        ("RuntimeError('[gloo] Connection closed by peer')", "rank 1 gave no sign of life for"),
    ],
)
def test_an_error_that_is_a_deadline_of_its_own_or_a_lost_peer_ends_the_same_way(
    error: str, named: str
) -> None:
    done = run(
        BOARD + f"\n    with Watchdog(6, 'rank 0', Board()):\n        time.sleep(0.5)\n        raise {error}"
    )
    assert done.returncode == EXPIRED and named in done.stderr, done.stderr


def test_any_other_error_stays_what_it_is() -> None:
    done = run(
        BOARD.replace("1 alive waiting for the engine: to start", "7 done -")
        + """
    class NonFiniteError(RuntimeError):
        pass
    with Watchdog(30, 'rank 0', Board()):
        raise NonFiniteError("lost")
    """
    )
    assert done.returncode == 1 and "NonFiniteError: lost" in done.stderr and "deadline" not in done.stderr
