"""A run over a pool gives the same weights to the bit, however many workers there are and whatever happens to
them: the learner, the pushes over gloo, the proofs, HTTP and the workers' processes are real; the policy is a
table of next-token log-probs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rltrain.protocols import WorkersGone
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.pool.members import MemberState
from rltrain.sync.colocated import Sync
from rltrain.types.samples import Request, Sampling
from support.fake_pool import FakeHome, Ranks, make_other_rank, make_weights, wait_until
from support.pool_runs import (
    PROMPTS,
    SAMPLES,
    STEPS,
    Pool,
    open_pool,
    require_conserved,
    train,
    train_engine,
)


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], Pool]]:
    """Pools of one, two and three workers, kept from one seed to the next."""
    with contextlib.ExitStack() as stack:
        kept: dict[int, Pool] = {}

        def get(count: int) -> Pool:
            if count not in kept:
                kept[count] = stack.enter_context(open_pool(count))
            return kept[count]

        yield get


@pytest.mark.parametrize("seed", range(20))
def test_weights_do_not_depend_on_the_workers(pools: Callable[[int], Pool], seed: int) -> None:
    """One worker; two; three, of which one is ten times slower and one is killed at a random token."""
    single = train(pools(1), seed)
    pair = train(pools(2), seed)
    assert len(single.samples) == STEPS * len(PROMPTS) * SAMPLES
    assert pair == single

    three = pools(3)
    three.wait_for_all()
    chance = random.Random(seed)
    slow, doomed = chance.sample(sorted(three.homes), 2)
    three.homes[slow].change(seconds=0.01)
    killed_at = chance.randrange(1, STEPS + 1)
    starts = three.homes[doomed].starts

    def strike(step: int) -> None:
        if step == killed_at:
            three.homes[doomed].change(die_after=chance.randrange(SAMPLES))

    assert train(three, seed, strike) == single
    if three.homes[doomed].starts == starts and three.state(doomed) is MemberState.SERVING:
        three.homes[doomed].signal(signal.SIGKILL)  # nothing was left for it to write
    wait_until(lambda: three.homes[doomed].starts > starts)
    three.wait_for_all()
    three.homes[slow].change(seconds=0.001)
    for count in (1, 2, 3):
        require_conserved(pools(count).pool)


def test_a_killed_workers_samples_go_to_another_without_any_deadline() -> None:
    """Its connections break: no sign of life has to be missed."""
    with open_pool(2, alive=600.0) as pool:
        pool.wait_for_all()
        for home in pool.homes.values():
            home.change(seconds=0.05)
        sampler = start_sampling(pool)
        doomed = pool.members["worker 0"]
        wait_until(lambda: doomed.leases)
        pool.homes["worker 0"].signal(signal.SIGKILL)
        wait_until(lambda: doomed.state is not MemberState.SERVING)
        assert not doomed.leases and pool.pool.counts.returned > 0
        answers = list(sampler)
        assert len(answers) == len(PROMPTS)
        workers = {completion.worker for answer in answers for completion in answer.completions}
        assert "worker 1" in workers <= {"worker 0", "worker 1"}
        require_conserved(pool.pool)


def test_a_stopped_worker_is_noticed_by_two_missed_signs_of_life() -> None:
    """Its server accepts connections and its requests never end; a round trip through it does not return."""
    with open_pool(2, alive_seconds=0.8, alive=0.2) as pool:
        pool.wait_for_all()
        for home in pool.homes.values():
            home.change(seconds=0.05)
        sampler = start_sampling(pool)
        stopped = pool.members["worker 0"]
        wait_until(lambda: stopped.leases)
        pool.homes["worker 0"].signal(signal.SIGSTOP)
        wait_until(lambda: any("2 times in a row" in line for line in pool.lines))
        assert len(list(sampler)) == len(PROMPTS)
        require_conserved(pool.pool)


def start_sampling(pool: Pool, seed: int = 3) -> Any:
    """Answers of a batch whose requests are on their way."""
    weights = make_weights(seed)
    sync = Sync([pool.engine], {}, sample=4, full_every=1, seed=0)
    sync.push(lambda dtype: weights.items(), 0, expect_change=False)
    sampling = Sampling(SAMPLES, 1.0, 12, 0)
    return pool.engine.sample([Request(prompt, sampling, 0, SAMPLES) for prompt in PROMPTS], 0)


def test_a_worker_that_comes_back_in_the_middle_of_a_step_serves_in_it() -> None:
    """The only worker dies; the new process gets all weights, is proved, and finishes the step."""
    with open_pool(1) as pool:
        home = pool.homes["worker 0"]
        expected = train(pool, 5)

        def strike(step: int) -> None:
            if step == 2:
                home.change(die_after=20)

        assert train(pool, 5, strike) == expected
        assert home.starts == 2
        assert any("is lost" in line for line in pool.lines)
        assert any("is back" in line for line in pool.lines)
        require_conserved(pool.pool)


def test_two_ranks_train_what_one_does() -> None:
    """Rank 1 only joins gathers. The only worker dies in the second step, so that both ranks join the push
    to its successor in the middle of it.
    """
    with open_pool(1) as pool:
        single = train(pool, 5)
    ranks = Ranks(2)
    homes = {"worker 0": FakeHome()}
    of_rank = [
        {"rank": rank, "world_size": 2, "gather": functools.partial(ranks.gather, rank)} for rank in (0, 1)
    ]
    pool = Pool(homes, of_rank[0])
    other = make_other_rank(**of_rank[1])

    def strike(step: int) -> None:
        if step == 2:
            homes["worker 0"].change(die_after=20)

    with ThreadPoolExecutor(2) as threads:
        main_rank = threads.submit(train_engine, pool.engine, 5, strike, 0, ranks)
        other_rank = threads.submit(train_engine, other, 5, rank=1, ranks=ranks)
        try:
            assert main_rank.result(120) == other_rank.result(120) == single
        finally:
            other.close()
            pool.engine.close()
    assert homes["worker 0"].starts == 2


def test_a_worker_that_joins_later_is_sent_the_weights_and_serves() -> None:
    with open_pool(1) as pool:
        expected = train(pool, 5)
        pool.homes["worker 0"].change(seconds=0.01)
        late = FakeHome()

        def join(step: int) -> None:
            if step == 2:
                pool.run(pool.pool.add("worker 1", late))
                wait_until(lambda: pool.state("worker 1") is MemberState.ATTACHED)

        assert train(pool, 5, join) == expected
        assert pool.state("worker 1") is MemberState.SERVING and pool.members["worker 1"].written > 0


def test_without_workers_the_engine_says_so_and_stays_usable() -> None:
    with open_pool(2, patience=0.3) as pool:
        pool.wait_for_all()
        weights = make_weights(0)
        sync = Sync([pool.engine], {}, sample=4, full_every=1, seed=0)
        sync.push(lambda dtype: weights.items(), 0, expect_change=False)
        for home in pool.homes.values():
            home.refusal = "no machine"
            home.signal(signal.SIGKILL)
        sampling = Sampling(SAMPLES, 1.0, 12, 0)
        with pytest.raises(WorkersGone, match=r"worker 0 is (lost|starting).*worker 1 is (lost|starting)"):
            sample_groups(pool.engine, PROMPTS, sampling, 0)
        pool.pool.rules = dataclasses.replace(pool.pool.rules, patience=60.0)
        for home in pool.homes.values():
            home.refusal = None
        assert len(sample_groups(pool.engine, PROMPTS, sampling, 0)) == len(PROMPTS)


def test_garbage_is_asked_for_again_and_three_strikes_quarantine() -> None:
    with open_pool(2) as pool:
        expected = train(pool, 7)
        pool.wait_for_all()
        pool.homes["worker 1"].change(fault="nan")
        assert train(pool, 7) == expected
        assert pool.state("worker 1") is MemberState.QUARANTINED
        assert pool.pool.counts.refused == 3
        assert pool.homes["worker 1"].is_closed
        require_conserved(pool.pool)


def test_a_pool_of_quarantined_workers_ends_at_once() -> None:
    with open_pool(1, patience=600.0) as pool:
        weights = make_weights(0)
        sync = Sync([pool.engine], {}, sample=4, full_every=1, seed=0)
        sync.push(lambda dtype: weights.items(), 0, expect_change=False)
        pool.homes["worker 0"].change(fault="floor")
        with pytest.raises(WorkersGone, match="quarantined: 3 of its answers"):
            sample_groups(pool.engine, PROMPTS, Sampling(SAMPLES, 1.0, 12, 0), 0)


@pytest.mark.parametrize("fault", ["500", "503", "choice twice", "other version", "close in mid-body"])
def test_any_answer_that_is_refused_costs_no_sample(fault: str) -> None:
    with open_pool(2) as pool:
        expected = train(pool, 9)
        pool.wait_for_all()
        pool.homes["worker 1"].change(fault=fault, fault_count=2)
        assert train(pool, 9) == expected
        require_conserved(pool.pool)
