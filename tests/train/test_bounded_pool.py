"""Workers sample without a break while the policy is updated: every token is an exact sample of the version
that it names, and none is older than the bound when a step trains on it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rltrain.checkpoint.journal import Journal, WaitingGroups
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.errors import UserError
from rltrain.process import ALONE
from rltrain.protocols import WorkersGone
from rltrain.rollout.window import Window
from rltrain.train.bounded import BoundedRollouts
from rltrain.train.journaled import JournaledRollouts
from rltrain.types.samples import Completion, Request, RolloutGroup, Span
from support.fake_pool import make_weights, wait_until
from support.learners import SAMPLING, Learner, colocated, error_of
from support.pool_runs import PROMPTS, SAMPLES, Pool, open_pool, require_conserved
from support.pool_runs import update as update_table

STEPS = 5
MODES = ("in_flight", "abort", "drain")


@contextlib.contextmanager
def bounded(
    pool: Pool, learner: Learner, folder: Path, versions: int, *, waits: bool = True
) -> Iterator[tuple[BoundedRollouts, JournaledRollouts]]:
    """The source, free of the pool's end."""
    folder.mkdir()
    source = BoundedRollouts(
        colocated(pool, learner.sync),
        pool.engine.run_freely(),
        Window(versions, len(PROMPTS), waits),
        WaitingGroups(RunFolder(folder)),
        STEPS,
        learner.digest,
    )
    try:
        yield source, JournaledRollouts(source, Journal(RunFolder(folder)), ALONE, learner.digest)
    finally:
        source.engine.close()


def train(
    pool: Pool,
    source: JournaledRollouts,
    learner: Learner,
    versions: int,
    at_step: Callable[[int], None] = lambda step: None,
) -> list[Completion]:
    """The completions that were trained on, each of them checked."""
    trained: list[Completion] = []
    learner.push(0)
    for step in range(1, STEPS + 1):
        at_step(step)
        groups = source.take(step, step - 1).groups
        assert len(groups) == len(PROMPTS)
        for group in groups:
            last = group.prompt.token_ids[-1]
            for completion in group.completions:
                ages = [step - 1 - span.version for span in completion.versions]
                assert min(ages) >= 0 and max(ages) <= versions
                assert error_of(last, completion, learner.past) < 1e-5
                trained.append(completion)
        update_table(
            learner.weights, [RolloutGroup(each.group, each.prompt, each.completions) for each in groups]
        )
        source.settle()
        learner.push(step)
    return trained


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[str], Pool]]:
    """Two workers for each way to update them, kept from one case to the next."""
    with contextlib.ExitStack() as stack:
        opened: dict[str, Pool] = {}

        def open_once(update: str) -> Pool:
            if update not in opened:
                opened[update] = stack.enter_context(open_pool(2, alive_seconds=60.0, update=update))
            opened[update].wait_for_all()
            return opened[update]

        yield open_once


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("update", MODES)
def test_every_token_is_of_the_version_that_it_names(
    update: str, waits: bool, pools: Callable[[str], Pool], tmp_path: Path
) -> None:
    """One worker is slow, and is killed in the third step."""
    pool = pools(update)
    slow = pool.homes["worker 1"]
    slow.change(seconds=0.005)
    starts = slow.starts

    def strike(step: int) -> None:
        if step == 3:
            slow.signal(signal.SIGKILL)

    learner = Learner(pool)
    with bounded(pool, learner, tmp_path / "run", 2, waits=waits) as (_, source):
        trained = train(pool, source, learner, 2, strike)
    assert Journal(RunFolder(tmp_path / "run")).steps() == [*range(1, STEPS + 1)]
    if update != "in_flight":
        assert all(len(completion.versions) == 1 for completion in trained)
    wait_until(lambda: slow.starts > starts)
    require_conserved(pool.pool)


@pytest.mark.parametrize("update", MODES)
def test_with_a_bound_of_none_a_run_is_the_synchronous_one(
    update: str, pools: Callable[[str], Pool], tmp_path: Path
) -> None:
    pool = pools(update)
    learner = Learner(pool)
    with bounded(pool, learner, tmp_path / "run", 0) as (_, source):
        train(pool, source, learner, 0)
    plain = Learner(pool)
    source = colocated(pool, plain.sync)
    plain.push(0)
    for step in range(1, STEPS + 1):
        groups = source.take(step, step - 1).groups
        update_with = [RolloutGroup(each.group, each.prompt, each.completions) for each in groups]
        update_table(plain.weights, update_with)
        plain.push(step)
    assert plain.digest() == learner.digest()


def sample_across_a_push(pool: Pool, learner: Learner, versions: Sequence[int]) -> list[RolloutGroup]:
    """Groups of which, at the push of the second version, every worker had written some tokens."""
    free = pool.engine.run_freely()
    long = replace(SAMPLING, max_tokens=200)
    for home in pool.homes.values():
        home.change(seconds=0.005)
    before = {name: home.worker.read("written") for name, home in pool.homes.items()}
    for number, prompt in enumerate(PROMPTS):
        free.begin(number, Request(prompt, long, 0, SAMPLES), versions[0])
    wait_until(lambda: any(home.worker.read("written") > before[name] for name, home in pool.homes.items()))
    learner.weights["table"] += torch.randn(learner.weights["table"].shape)
    learner.push(versions[1])
    for home in pool.homes.values():
        home.change(seconds=0.0)
    answers = [free.next() for _ in PROMPTS]
    free.close()
    return [answer[1] for answer in answers if answer is not None]


def errors_across_a_push(pool: Pool) -> list[float]:
    """Of the completions with tokens of both versions: until there is one, with further pushes."""
    learner = Learner(pool)
    learner.push(0)
    for version in range(1, 50):
        groups = sample_across_a_push(pool, learner, (version - 1, version))
        errors = [
            error_of(group.prompt.token_ids[-1], completion, learner.past)
            for group in groups
            for completion in group.completions
            if len(completion.versions) > 1
        ]
        if errors:
            return errors
    raise AssertionError("no completion went on after a push")


def test_a_request_goes_on_with_new_weights(pools: Callable[[str], Pool]) -> None:
    assert max(errors_across_a_push(pools("in_flight"))) < 1e-5


def test_what_was_computed_from_old_weights_would_be_seen(pools: Callable[[str], Pool]) -> None:
    """The same test on workers that clear no cache: it can fail."""
    pool = pools("in_flight")
    for home in pool.homes.values():
        home.change(keeps_cache=True)
    try:
        assert max(errors_across_a_push(pool)) > 1e-3
    finally:
        for home in pool.homes.values():
            home.change(keeps_cache=False)


def test_an_evaluation_names_its_version_while_groups_are_outstanding(
    pools: Callable[[str], Pool], tmp_path: Path
) -> None:
    pool = pools("in_flight")
    learner = Learner(pool)
    with bounded(pool, learner, tmp_path / "run", 3) as (source, journaled):
        learner.push(0)
        journaled.take(1, 0)
        learner.weights["bias"] += 1.0 * torch.arange(len(learner.weights["bias"])) / 101
        learner.push(1)
        assert len(source.window.draws) == 3 * len(PROMPTS)
        groups = source.evaluate(PROMPTS, replace(SAMPLING, n=2), 1)
        versions = {span.version for each in groups for row in each.completions for span in row.versions}
        assert versions == {1}
        with pytest.raises(RuntimeError, match="version 0 but the weights held are version 1"):
            source.evaluate(PROMPTS, replace(SAMPLING, n=2), 0)
        assert len(journaled.take(2, 1).groups) == len(PROMPTS)


def test_what_ends_the_workers_is_raised_where_a_step_waits(tmp_path: Path) -> None:
    with open_pool(1, alive_seconds=60.0, patience=0.2, update="in_flight") as pool:
        learner = Learner(pool)
        with bounded(pool, learner, tmp_path / "run", 1) as (_, source):
            learner.push(0)
            pool.homes["worker 0"].refusal = "by order"
            pool.homes["worker 0"].change(seconds=60.0)
            pool.homes["worker 0"].signal(signal.SIGKILL)
            with pytest.raises((WorkersGone, UserError), match=r"by order|no worker serves"):
                source.take(1, 0)


def test_the_tables_errors_are_seen() -> None:
    """The check of this file itself: a log-prob that is off by 0.01 is found."""
    weights = {0: make_weights(0)}
    row = torch.log_softmax((weights[0]["table"] + weights[0]["bias"]).double()[5], 0)
    token = int(np.argmax(row.numpy()))
    sound = Completion((token,), (float(row[token]),), "length", "", (Span(0, 1, 0),))
    assert error_of(5, sound, weights) < 1e-9
    assert error_of(5, replace(sound, logprobs=(float(row[token]) + 0.01,)), weights) > 0.005
