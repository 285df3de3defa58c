"""Every fault at every phase of a push to two workers: the run trains what it trains without the fault, and
the worker that failed serves again.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from support.fake_pool import FakeHome, wait_until
from support.pool_runs import Outcome, Pool, require_conserved, train

# phase -> the call of the worker's server at which the fault strikes
PHASES = {
    "pause": "/pause",
    "join": "/init_weight_transfer_engine",
    "start": "/start_weight_update",
    "second bucket": "/update_weights",
    "finish": "/finish_weight_update",
    "proof": "rltrain_fingerprint",
    "resume": "/resume",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    homes = {f"worker {place}": FakeHome(alive_seconds=1.0) for place in range(2)}
    pool = Pool(homes, {"push_seconds": 1.5}, alive=0.2)
    with contextlib.closing(pool.engine):
        yield pool


@pytest.fixture(scope="module")
def expected(pool: Pool) -> Outcome:
    return train(pool, 11)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("strike", ["error", "die", "stop"])
def test_every_fault_at_every_phase(pool: Pool, expected: Outcome, phase: str, strike: str) -> None:
    pool.wait_for_all()
    struck = pool.homes["worker 1"]
    starts = struck.starts
    fault = {"route": PHASES[phase], "strike": strike}
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
        assert was_restarted == (phase in ("pause", "proof"))
    else:
        assert was_restarted
    require_conserved(pool.pool)
