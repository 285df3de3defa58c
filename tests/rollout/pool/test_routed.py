"""A router in front of the workers takes the requests; weights and proofs go to the workers themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rltrain.protocols import WorkersGone
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.pool.members import MemberState
from rltrain.sync.colocated import Sync
from rltrain.types.samples import Sampling
from support.fake_pool import FakeHome, make_weights, wait_until
from support.fake_router import FakeRouter, fake_router
from support.pool_runs import PROMPTS, SAMPLES, Outcome, Pool, open_pool, require_conserved, train


@pytest.fixture(scope="module")
def expected() -> Outcome:
    with open_pool(1) as pool:
        return train(pool, 5)


@contextlib.contextmanager
def open_routed(**rules: float) -> Iterator[tuple[Pool, FakeRouter]]:
    homes = {f"worker {place}": FakeHome() for place in range(2)}
    with (
        tempfile.TemporaryDirectory(prefix="fr-") as folder,
        fake_router(Path(folder), lambda: [home.socket for home in homes.values()]) as router,
    ):
        pool = Pool(homes, {"router": router.url}, **rules)
        with contextlib.closing(pool.engine):
            pool.wait_for_all()
            yield pool, router


def test_a_router_trains_what_one_worker_does_though_one_is_killed(expected: Outcome) -> None:
    """The killed one answers the router with nothing at first, then, started again, for weights that no push
    has sent.
    """
    with open_routed() as (pool, router):
        assert train(pool, 5) == expected
        assert set(router.asked) == {0, 1}
        starts = pool.homes["worker 1"].starts

        def strike(step: int) -> None:
            if step == 2:
                pool.homes["worker 1"].change(die_after=3)

        assert train(pool, 5, strike) == expected
        wait_until(lambda: pool.homes["worker 1"].starts > starts)
        pool.wait_for_all()
        assert train(pool, 5) == expected
        require_conserved(pool.pool)


def test_answers_of_other_weights_are_asked_for_again(expected: Outcome) -> None:
    with open_routed() as (pool, _):
        pool.homes["worker 1"].change(fault="other version", fault_count=2)
        assert train(pool, 5) == expected
        assert pool.pool.counts.refused == 2
        assert pool.state("worker 1") is MemberState.SERVING  # nobody knows which worker it was
        require_conserved(pool.pool)


def test_a_worker_that_holds_other_weights_ends_the_run() -> None:
    """No push can keep the router from asking it."""
    with open_routed() as (pool, _):
        push(pool)
        pool.run(pool.pool.end_push(0, (), {}, {"worker 1": RuntimeError("its weights differ")}))
        batch_ends(pool, "worker 1 is quarantined: its weights differ; the router may still ask it")


def test_a_router_that_answers_nothing_ends_the_run_in_time() -> None:
    with open_routed(patience=0.3) as (pool, router):
        push(pool)
        router.is_deaf = True
        batch_ends(pool, "has answered nothing for long.*502")
        router.is_deaf = False
        pool.pool.rules = dataclasses.replace(pool.pool.rules, patience=60.0)
        assert len(sample_groups(pool.engine, PROMPTS, Sampling(SAMPLES, 1.0, 12, 0), 0)) == len(PROMPTS)
        require_conserved(pool.pool)


def push(pool: Pool) -> None:
    weights = make_weights(0)
    sync = Sync([pool.engine], {}, sample=4, full_every=1, seed=0)
    sync.push(lambda dtype: weights.items(), 0, expect_change=False)


def batch_ends(pool: Pool, words: str) -> None:
    with pytest.raises(WorkersGone, match=words):
        sample_groups(pool.engine, PROMPTS, Sampling(SAMPLES, 1.0, 12, 0), 0)
