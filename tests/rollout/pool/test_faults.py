"""Every fault at every phase of a push to two workers: the run trains what it trains without the fault, and
the worker that failed serves again.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from support.fake_pool import FakeHome, wait_until
from support.fake_worker import PHASES, READ
from support.pool_runs import Outcome, Pool, require_conserved, train


def open_pool(push_seconds: float, alive_seconds: float) -> Pool:
    homes = {f"worker {place}": FakeHome(alive_seconds=alive_seconds) for place in range(2)}
    return Pool(homes, {"push_seconds": push_seconds}, alive=0.2)


@pytest.fixture(scope="module")
def patient() -> Iterator[Pool]:
    """Whose deadlines no machine is too slow for."""
    pool = open_pool(push_seconds=60.0, alive_seconds=60.0)
    with contextlib.closing(pool.engine):
        yield pool


@pytest.fixture(scope="module")
def hasty() -> Iterator[Pool]:
    """Which does not wait long for a worker that hangs; on a slow machine it gives up others too."""
    pool = open_pool(push_seconds=1.5, alive_seconds=1.0)
    with contextlib.closing(pool.engine):
        yield pool


@pytest.fixture(scope="module")
def expected(patient: Pool) -> Outcome:
    return train(patient, 11)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [*PHASES, READ])
@pytest.mark.parametrize("strike", ["error", "die", "stop"])
def test_every_fault_at_every_phase(
    request: pytest.FixtureRequest, expected: Outcome, phase: str, strike: str
) -> None:
    """Only a worker that stops is waited for until a deadline; any other's fault is noticed by itself."""
    pool: Pool = request.getfixturevalue("hasty" if strike == "stop" else "patient")
    pool.wait_for_all()
    struck = pool.homes["worker 1"]
    starts = struck.starts
    fault = {"route": PHASES.get(phase, phase), "strike": strike}
    if phase == "join":  # once for every process: the first push to a new one
        struck.signal(signal.SIGKILL)
        wait_until(lambda: struck.starts > starts)
        pool.wait_for_all()
        struck.change(**fault)

    def order(step: int) -> None:
        if step == 2 and phase != "join":
            struck.change(**fault)

    assert train(pool, 11, order) == expected
    pool.wait_for_all()
    was_restarted = struck.starts > starts + (phase == "join")
    if strike == "error":  # a second complete push mends it, except where it refuses to pause or to be read
        assert was_restarted == (phase in ("pause", READ))
    else:
        assert was_restarted
    require_conserved(pool.pool)
