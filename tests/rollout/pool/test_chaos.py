"""A run over a pool gives the same weights to the bit, however many workers there are and whatever happens to
them: the learner, the pushes over gloo, the proofs, HTTP and the workers' processes are real; the policy is a
table of next-token log-probs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from rltrain.protocols import WorkersGone
from rltrain.rollout.engines.vllm_pool import VllmPool
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.pool.members import MemberState
from rltrain.rollout.pool.pool import PoolRules, WorkerPool
from rltrain.seeds import stable_hash
from rltrain.sync.colocated import Sync
from rltrain.types.samples import Prompt, Request, RolloutGroup, Sampling
from support.fake_pool import FakeHome, Ranks, make_engine, make_other_rank, make_weights, wait_until
from support.fake_server import VOCABULARY

PROMPTS = [Prompt(f"p{place}", (20 + place, 40 + place), "") for place in range(6)]
STEPS = 3
SAMPLES = 4


@dataclass
class Outcome:
    """What a run trained on, and what it came to."""

    weights: str
    samples: list[tuple[int, ...]] = field(default_factory=list)


class Pool:
    """The workers of a test and the engine over them."""

    def __init__(
        self, homes: dict[str, FakeHome], ranks: Mapping[str, Any] | None = None, **rules: Any
    ) -> None:
        self.homes = homes
        self.lines: list[str] = []
        settings = {"patience": 60.0, "alive": 0.5, "poll": 0.02, "retry": 0.05, "busy": 0.05} | rules
        self.engine, self.pool = make_engine(
            homes, PoolRules(VOCABULARY, **settings), self.lines.append, **(ranks or {})
        )

    @property
    def members(self) -> dict[str, Any]:
        return self.pool.members

    def state(self, name: str) -> MemberState:
        return self.pool.members[name].state

    def run(self, work: Any) -> Any:
        assert self.engine.loop is not None
        return self.engine.loop.run(work).result()

    def wait_for_all(self) -> None:
        usable = (MemberState.ATTACHED, MemberState.SERVING)
        wait_until(lambda: all(self.state(name) in usable for name in self.homes))


@contextlib.contextmanager
def open_pool(count: int, alive_seconds: float = 5.0, **rules: Any) -> Iterator[Pool]:
    homes = {f"worker {place}": FakeHome(alive_seconds) for place in range(count)}
    pool = Pool(homes, **rules)
    try:
        yield pool
    finally:
        pool.engine.close()


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


def train(pool: Pool, seed: int, at_step: Callable[[int], None] = lambda step: None) -> Outcome:
    return train_engine(pool.engine, seed, at_step)


def train_engine(
    engine: VllmPool,
    seed: int,
    at_step: Callable[[int], None] = lambda step: None,
    rank: int = 0,
    ranks: Ranks | None = None,
) -> Outcome:
    """A policy gradient on the table: tokens of completions with large ids become likelier."""
    weights = make_weights(seed)
    sync = Sync([engine], {}, sample=4, full_every=1, seed=0)
    sync.push(lambda dtype: weights.items(), 0, expect_change=False)
    samples: list[tuple[int, ...]] = []
    for step in range(1, STEPS + 1):
        at_step(step)
        sampling = Sampling(SAMPLES, 1.0, 12, stable_hash(seed, "rollout", step))
        share = PROMPTS if ranks is None else PROMPTS[rank::2]
        groups = sample_groups(engine, share, sampling, step - 1)
        if ranks is not None:
            groups = sorted(ranks.gather(rank, groups), key=lambda group: group.prompt.id)
        sync.verify()
        samples += [completion.token_ids for group in groups for completion in group.completions]
        update(weights, groups)
        sync.push(lambda dtype: weights.items(), step, expect_change=True)
    return Outcome(digest(weights), samples)


def update(weights: dict[str, Tensor], groups: list[RolloutGroup]) -> None:
    for group in groups:
        scores = [sum(completion.token_ids) / VOCABULARY for completion in group.completions]
        mean = sum(scores) / SAMPLES
        for score, completion in zip(scores, group.completions, strict=True):
            last = group.prompt.token_ids[-1]
            for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
                step = 0.01 * (score - mean) * (1 + logprob / 10)
                weights["table"][last, token] += step
                weights["bias"][token] += step / 10
                last = token


def digest(weights: dict[str, Tensor]) -> str:
    sums = hashlib.sha256()
    for name in sorted(weights):
        sums.update(weights[name].numpy().tobytes())
    return sums.hexdigest()


def require_conserved(pool: WorkerPool) -> None:
    """Every request was answered once, or its samples were asked for again."""
    wait_until(lambda: pool.counts.asked == pool.counts.answered + pool.counts.returned)
    assert all(not member.leases for member in pool.members.values())


@pytest.mark.parametrize("seed", range(20))
def test_weights_do_not_depend_on_the_workers(pools: Callable[[int], Pool], seed: int) -> None:
    """One worker; two; three, of which one is ten times slower and one is killed at a random token."""
    alone = train(pools(1), seed)
    pair = train(pools(2), seed)
    assert len(alone.samples) == STEPS * len(PROMPTS) * SAMPLES
    assert pair == alone

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

    assert train(three, seed, strike) == alone
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
        assert len(list(sampler)) == len(PROMPTS)
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
        alone = train(pool, 5)
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
        mine = threads.submit(train_engine, pool.engine, 5, strike, 0, ranks)
        others = threads.submit(train_engine, other, 5, rank=1, ranks=ranks)
        try:
            assert mine.result(120) == others.result(120) == alone
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
