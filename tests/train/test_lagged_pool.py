"""With a lag, workers sample while the policy is updated: its weights depend neither on how many workers
there are, nor on how fast they are, nor on which of them die.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rltrain.checkpoint.journal import Journal
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.process import ALONE
from rltrain.protocols import WorkersGone
from rltrain.sync.colocated import Sync
from rltrain.train.journaled import JournaledRollouts
from rltrain.train.lagged import LaggedRollouts
from rltrain.train.sampled_run import KeptWeights
from rltrain.types.samples import RolloutGroup
from support.fake_pool import make_weights, wait_until
from support.learners import TableSource
from support.pool_runs import SAMPLES, Pool, digest, open_pool, require_conserved, update

STEPS = 5


def train(
    pool: Pool,
    folder: Path,
    lag: int,
    *,
    overlaps: bool,
    at_sampling: Callable[[int], None] = lambda step: None,
    at_update: Callable[[int], None] = lambda step: None,
) -> str:
    """The digest of the final weights of a policy gradient with this lag."""
    weights = make_weights(3)
    sync = Sync([pool.engine], {}, sample=4, full_every=1, seed=0)
    inner = TableSource(pool.engine, sync, 3, at_sampling)
    journal = Journal(RunFolder(folder))
    folder.mkdir()
    source = LaggedRollouts(
        JournaledRollouts(inner, journal, ALONE, lambda: digest(weights)), lag, STEPS, overlaps
    )

    def push(version: int) -> None:
        source.settle()
        sync.push(KeptWeights(lambda dtype: iter(weights.items())), version, expect_change=version > 0)

    push(0)
    for step in range(1, STEPS + 1):
        rollouts = source.take(step, step - 1)
        groups = [RolloutGroup(group.group, group.prompt, group.completions) for group in rollouts.groups]
        versions = {span.version for group in groups for each in group.completions for span in each.versions}
        assert versions == {max(0, step - 1 - lag)}
        at_update(step)
        update(weights, groups)
        push(step)
    assert inner.asked == [(step, max(0, step - 1 - lag)) for step in range(1, STEPS + 1)]
    assert journal.steps() == [*range(1, STEPS + 1)]
    return digest(weights)


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], Pool]]:
    """Pools of one, two and three workers, kept from one case to the next."""
    with contextlib.ExitStack() as stack:
        opened: dict[int, Pool] = {}

        def open_once(count: int) -> Pool:
            if count not in opened:
                opened[count] = stack.enter_context(open_pool(count, alive_seconds=60.0))
            opened[count].wait_for_all()
            return opened[count]

        yield open_once


@pytest.fixture(scope="module")
def expected(pools: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The final weights by lag, of one worker that the learner waits for."""
    folder = tmp_path_factory.mktemp("expected")
    return {lag: train(pools(1), folder / str(lag), lag, overlaps=False) for lag in (0, 1, 2)}


def test_lags_train_on_other_samples(expected: dict[int, str]) -> None:
    assert len(set(expected.values())) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("lag", [1, 2])
def test_the_weights_do_not_depend_on_the_workers(
    lag: int, count: int, pools: Callable[[int], Pool], expected: dict[int, str], tmp_path: Path
) -> None:
    """The last worker is ten times slower, and is killed while the policy is updated; it comes back, and is
    sent the weights that it samples for, which the policy no longer has.
    """
    pool = pools(count)
    last = pool.homes[f"worker {count - 1}"]
    starts = last.starts
    last.change(seconds=0.01)

    def kill(step: int) -> None:
        if step == 2:
            last.signal(signal.SIGKILL)

    assert train(pool, tmp_path / "run", lag, overlaps=True, at_update=kill) == expected[lag]
    wait_until(lambda: last.starts > starts)


@pytest.mark.parametrize(("lag", "seed"), [(1 + seed % 2, seed) for seed in range(20)])
def test_nor_on_the_token_at_which_a_worker_dies(
    lag: int, seed: int, pools: Callable[[int], Pool], expected: dict[int, str], tmp_path: Path
) -> None:
    """Of three workers one is ten times slower, and another ends at a random token of a random step."""
    pool = pools(3)
    chance = random.Random(seed)
    slow, doomed = (pool.homes[name] for name in chance.sample(sorted(pool.homes), 2))
    slow.change(seconds=0.01)
    struck_at = chance.randrange(1, STEPS - lag + 1)
    starts = doomed.starts

    def strike(step: int) -> None:
        if step == struck_at:
            doomed.change(die_after=chance.randrange(SAMPLES))

    assert train(pool, tmp_path / "run", lag, overlaps=True, at_update=strike) == expected[lag]
    if doomed.starts == starts:  # nothing was left for it to write
        doomed.signal(signal.SIGKILL)
    wait_until(lambda: doomed.starts > starts)
    slow.change(seconds=0.001)
    pool.wait_for_all()
    require_conserved(pool.pool)


def test_the_policy_is_updated_while_the_workers_sample(
    pools: Callable[[int], Pool], expected: dict[int, str], tmp_path: Path
) -> None:
    """Each waits for the other at every step: a run that took turns would never end."""
    meetings = {step: threading.Barrier(2, timeout=60.0) for step in range(3, STEPS + 1)}

    def meet(step: int) -> None:
        if step in meetings:
            meetings[step].wait()

    final = train(
        pools(1),
        tmp_path / "run",
        1,
        overlaps=True,
        at_sampling=meet,
        at_update=lambda step: meet(step + 1),
    )
    assert final == expected[1]


def test_what_ends_sampling_is_raised_where_the_weights_would_change(
    pools: Callable[[int], Pool], tmp_path: Path
) -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise WorkersGone("no worker serves")

    with pytest.raises(WorkersGone, match="no worker serves"):
        train(pools(1), tmp_path / "run", 1, overlaps=True, at_sampling=fail)


def test_kept_weights_stay_what_they_were() -> None:
    weights = {"w": torch.ones(2)}
    kept = KeptWeights(lambda dtype: iter(weights.items()))
    assert [value.tolist() for _, value in kept(torch.float32)] == [[1.0, 1.0]]
    weights["w"] += 1
    assert [value.tolist() for _, value in kept(torch.float32)] == [[1.0, 1.0]]
