"""The controller in a process of its own gives what the learner's process gives, to the bit; when it is
killed, the next one goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from rltrain.build.controller import ControllerSetup, _build_source, start_controller
from rltrain.build.inputs import build_grader
from rltrain.checkpoint.journal import Journal
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.config.load import load_recipe
from rltrain.data.tokenization import load_tokenization
from rltrain.process import ALONE, Process
from rltrain.rollout.controller import ControlledRollouts, ControllerGone
from rltrain.rollout.engines.controlled_pool import ControlledPool
from rltrain.rollout.source import Rollouts
from rltrain.rollout.worker.client import WorkerClient
from rltrain.rollout.worker.flags import worker_settings
from rltrain.rollout.worker.guard import TOKEN
from rltrain.sync.colocated import Sync
from rltrain.sync.server import WorkerLink
from rltrain.sync.transport import Pace
from rltrain.timeline import read_timeline
from rltrain.train.journaled import JournaledRollouts
from rltrain.train.lagged import LaggedRollouts
from rltrain.train.sampled_run import KeptWeights
from rltrain.types.samples import Prompt, Sampling, ScoredGroup
from rltrain.watchdog import no_deadline
from support.fake_pool import (
    MODEL,
    SECRET,
    FakeHome,
    Ranks,
    make_engine,
    make_pusher,
    make_weights,
    wait_until,
)
from support.pool_runs import PROMPTS, digest, update
from support.resumed_runs import SEVENS

STEPS = 3
RECIPE = Path(__file__).parents[3] / "recipes/policy/grpo.yaml"
HELD_OUT = [Prompt(f"h{place}", (30 + place, 50 + place), "") for place in range(3)]


@pytest.fixture(scope="module")
def homes() -> Iterator[dict[str, FakeHome]]:
    homes = {f"worker {place}": FakeHome() for place in range(2)}
    for home in homes.values():
        home.open()[0].close()
    yield homes
    for home in homes.values():
        home.close()


@pytest.fixture
def setup(
    homes: dict[str, FakeHome], random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ControllerSetup:
    monkeypatch.setenv(TOKEN, SECRET)
    urls = ", ".join(f"'unix:{home.socket}'" for home in homes.values())
    overrides = (
        f"model.path={random_model}",
        "rollout.engine=vllm_server",
        f"rollout.workers={{urls: [{urls}]}}",
        "rollout.prompts=4",
        "rollout.n=4",
        "rollout.max_tokens=12",
        "data.max_prompt_tokens=16",
        f"reward.functions=['{SEVENS}']",
    )
    recipe: Any = load_recipe(RECIPE, profile="tiny_cpu", overrides=overrides)
    prompts = tuple(PROMPTS)
    return ControllerSetup(
        recipe.data,
        recipe.rollout,
        recipe.reward,
        worker_settings(recipe.model, recipe.data, recipe.rollout, "float32", on_gpu=False),
        load_tokenization(recipe.model, recipe.data, recipe.rollout),
        prompts,
        {prompt.id: prompt for prompt in (*prompts, *HELD_OUT)},
        11,
        60.0,
        tmp_path / "rewards.log",
        tmp_path / "timeline.jsonl",
    )


def open_rank(setup: ControllerSetup, rank: int = 0, ranks: Ranks | None = None) -> ControlledRollouts:
    """What one rank of the learner has; ``verify`` compares all weights."""
    gather: Callable[[list[Any]], list[Any]] = list
    process = ALONE
    if ranks is not None:
        gather = functools.partial(ranks.gather, rank)
        process = Process(rank=rank, world_size=2, gather=gather, is_main=rank == 0)
    controller, state = start_controller(setup, process)

    def link(name: str, control: Any) -> WorkerLink:
        pace = Pace(seconds=20.0, alive_seconds=20.0)
        return WorkerLink(name, control, torch.float32, {}, 4096, torch.device("cpu"), pace=pace)

    pusher = make_pusher(link, {"rank": rank, "gather": gather})
    engine = ControlledPool(controller, WorkerClient, MODEL.shapes, pusher, torch.float32, gather=gather)
    sync = Sync([engine], {}, sample=4, full_every=1, seed=0)
    return ControlledRollouts(
        controller, engine, process, setup.prompts, setup.known, sync.verify, sync.sleep, state
    )


def train(
    source: Any, first: int = 1, weights: Any = None, at_step: Callable[[int], None] = lambda step: None
) -> tuple[str, list[Rollouts], Any]:
    """Steps ``first`` to the last. Returns the digest of the weights, what was sampled, and the weights, with
    which a later call goes on.
    """
    weights = make_weights(3) if weights is None else weights
    sync = source.verify.__self__
    sync.push(lambda dtype: weights.items(), first - 1, expect_change=False)
    taken: list[Rollouts] = []
    for step in range(first, STEPS + 1):
        at_step(step)
        taken.append(source.take(step, step - 1))
        update(weights, cast("Any", taken[-1].groups))
        sync.push(lambda dtype: weights.items(), step, expect_change=True)
        source.observe({"learner/entropy_mean": 1.0})
    return digest(weights), taken, weights


def require_equal(held: list[Rollouts], expected: list[Rollouts]) -> None:
    """All but seconds, and what tells about the workers."""
    plain = [dataclasses.replace(each, seconds={}, metrics=each.control_metrics) for each in held]
    assert plain == [dataclasses.replace(each, seconds={}, metrics=each.control_metrics) for each in expected]


def train_here(setup: ControllerSetup) -> tuple[str, list[Rollouts], list[ScoredGroup]]:
    """The same in this process, on one worker of its own."""
    engine, _ = make_engine({"worker 0": FakeHome()})
    engine._model = dataclasses.replace(MODEL, decode=setup.tokenization.decode, stop_token_ids=stops(setup))
    sync = Sync([engine], {}, sample=4, full_every=1, seed=0)
    with contextlib.closing(engine), build_grader(setup.reward, 60.0) as grader:
        source = _build_source(setup, cast("Any", engine), grader, cast("Any", no_deadline))
        source.verify, source.put_to_sleep = sync.verify, sync.sleep
        final, taken, _ = train(source)
        held_out = source.evaluate(HELD_OUT, Sampling(2, 0.0, 8, 5), STEPS)
    return final, taken, held_out


def stops(setup: ControllerSetup) -> tuple[int, ...]:
    return tuple(sorted(setup.tokenization.stop_tokens.stop))


def train_lagged(
    source: Any,
    folder: Path,
    at_update: Callable[[int], None] = lambda step: None,
    kept: dict[str, Any] | None = None,
    **how: Any,
) -> str:
    """The digest of the final weights with a lag of one. kept: the checkpoint after the latest push, with
    which a later call goes on.
    """
    kept = {"step": 0, "weights": make_weights(3)} if kept is None else kept
    weights = {name: weight.clone() for name, weight in kept["weights"].items()}
    first = kept["step"]
    sync = source.verify.__self__
    process = source.process if isinstance(source, ControlledRollouts) else ALONE
    journaled = JournaledRollouts(source, Journal(RunFolder(folder)), process, lambda: digest(weights))
    lagged = LaggedRollouts(journaled, 1, STEPS, **how)
    if "state" in kept:
        lagged.load_state_dict(kept["state"])
    for step in range(first, STEPS + 1):
        lagged.settle()
        if step > first:
            lagged.observe({"learner/entropy_mean": 1.0})
        sync.push(KeptWeights(lambda dtype: iter(weights.items())), step, expect_change=step > first)
        copy = {name: weight.clone() for name, weight in weights.items()}
        kept.update(step=step, weights=copy, state=lagged.state_dict())
        if step < STEPS:
            groups = lagged.take(step + 1, step).groups
            at_update(step + 1)
            update(weights, cast("Any", groups))
    return digest(weights)


def train_lagged_here(setup: ControllerSetup, folder: Path) -> str:
    """The same in this process, where sampling and learning take turns, on one worker of its own."""
    folder.mkdir()
    engine, _ = make_engine({"worker 0": FakeHome()})
    engine._model = dataclasses.replace(MODEL, decode=setup.tokenization.decode, stop_token_ids=stops(setup))
    sync = Sync([engine], {}, sample=4, full_every=1, seed=0)
    with contextlib.closing(engine), build_grader(setup.reward, 60.0) as grader:
        here = _build_source(setup, cast("Any", engine), grader, cast("Any", no_deadline))
        here.verify, here.put_to_sleep = sync.verify, sync.sleep
        return train_lagged(here, folder)


def test_it_samples_while_two_ranks_learn(
    setup: ControllerSetup, homes: dict[str, FakeHome], tmp_path: Path
) -> None:
    """With a lag of one, what one process does that takes turns; rank 0 finds the completions of the next
    step on its socket before the ranks wait for them.
    """
    homes["worker 1"].change(seconds=0.005)
    (tmp_path / "there").mkdir()
    expected = train_lagged_here(setup, tmp_path / "here")
    ranks = Ranks(2)
    arrived: list[bool] = []

    def learn(rank: int) -> str:
        source = open_rank(setup, rank, ranks)

        def strike(step: int) -> None:
            if source.controller is not None and step < STEPS:
                wait_until(lambda: source.controller is not None and source.controller.connection.poll())
                arrived.append(True)

        with contextlib.closing(source):
            return train_lagged(source, tmp_path / "there", strike, overlaps=True, has_thread=False)

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(learn, rank) for rank in (0, 1)]
        assert [job.result(300) for job in jobs] == [expected, expected]
    assert arrived == [True] * (STEPS - 1)


def test_a_controller_that_is_killed_costs_a_lagged_run_nothing(
    setup: ControllerSetup, homes: dict[str, FakeHome], tmp_path: Path
) -> None:
    """It ends while a worker has its requests for the next step; the run goes on from its checkpoint with
    another one, to the bit.
    """
    (tmp_path / "there").mkdir()
    expected = train_lagged_here(setup, tmp_path / "here")
    kept: dict[str, Any] = {"step": 0, "weights": make_weights(3)}
    how: dict[str, Any] = {"overlaps": True, "has_thread": False}
    left = homes["worker 0"].worker.read("running")  # of other controllers

    first: Any = open_rank(setup)
    observe = first.observe

    def slow_down(*numbers: Any) -> None:
        """Nothing is under way here, before the push after the first step."""
        homes["worker 0"].change(seconds=600.0)
        observe(*numbers)

    first.observe = slow_down

    def kill(step: int) -> None:
        if step == 2:
            wait_until(lambda: homes["worker 0"].worker.read("running") > left)
            os.kill(first.controller.process.pid, signal.SIGKILL)

    with contextlib.closing(first), pytest.raises(ControllerGone, match="exit code -9"):
        train_lagged(first, tmp_path / "there", kill, kept, **how)
    homes["worker 0"].change(seconds=0.001)
    assert kept["step"] == 1 and [step for step, _ in kept["state"]["ahead"]] == [2]
    journal = Journal(RunFolder(tmp_path / "there"))
    before = [journal.read(step) for step in (1, 2)]
    assert journal.steps() == [1, 2]

    with contextlib.closing(open_rank(setup)) as second:
        assert train_lagged(second, tmp_path / "there", kept=kept, **how) == expected
    assert [journal.read(step) for step in (1, 2)] == before


@pytest.mark.slow
def test_it_trains_what_one_process_does_and_a_new_one_goes_on(
    setup: ControllerSetup, homes: dict[str, FakeHome]
) -> None:
    """Two ranks; the controller is killed in the second step, and after it a worker."""
    final, taken, held_out = train_here(setup)
    ranks = Ranks(2)

    def kill(source: ControlledRollouts) -> None:
        """While it samples the second step."""
        if source.controller is not None:
            homes["worker 0"].change(seconds=0.2)
            source.controller.ask("take", 2, 1)
            os.kill(source.controller.process.pid, signal.SIGKILL)

    def lose(rank: int) -> tuple[Any, Any]:
        source: Any = open_rank(setup, rank, ranks)
        weights = make_weights(3)
        with contextlib.closing(source):
            sync = cast("Any", source.verify).__self__
            sync.push(lambda dtype: weights.items(), 0, expect_change=False)
            first = source.take(1, 0)
            update(weights, cast("Any", first.groups))
            sync.push(lambda dtype: weights.items(), 1, expect_change=True)
            source.observe({"learner/entropy_mean": 1.0})
            before = source.state_dict()
            kill(source)
            with pytest.raises(ControllerGone, match="exit code -9"):
                source.take(2, 1)
            sync.push(lambda dtype: weights.items(), 1, expect_change=False)  # to nobody
            source.load_state_dict(before)
            assert source.state_dict() == before
            require_equal([first], taken[:1])
            assert rank == 1 or source.engine.push_cost.bytes == 4 * sum(w.numel() for w in weights.values())
        return weights, before

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(lose, rank) for rank in (0, 1)]
        weights, before = jobs[0].result(300)
        jobs[1].result(300)
    homes["worker 0"].change(seconds=0.001)

    source: Any = open_rank(setup)
    with contextlib.closing(source):
        source.load_state_dict(before)

        def strike(step: int) -> None:
            if step == 3:
                homes["worker 1"].change(die_after=20)

        digest_after, rest, _ = train(source, 2, weights, strike)
        assert digest_after == final
        assert rest[1].logged_metrics["pool/lost"] == 1.0 and rest[1].logged_metrics["pool/workers"] == 1.0
        workers = source.engine.describe_workers()
        assert [info.dtype for info in workers.values()] == ["float32"]  # the other one is lost
        assert rest[0].logged_metrics["pool/outstanding_tokens"] > 0
        assert source.evaluate(HELD_OUT, Sampling(2, 0.0, 8, 5), STEPS) == held_out
    lines = read_timeline(setup.timeline)
    assert {line.lane for line in lines} == {"pushes", *(f"worker unix:{h.socket}" for h in homes.values())}
    assert {line.kind for line in lines} == {"push", "sample", "attached", "lost"}
    assert all(0 <= line.start <= line.stop for line in lines)


def test_it_ends_with_the_process_that_started_it(setup: ControllerSetup) -> None:
    """Its standard input does, whatever it is doing."""
    source = open_rank(setup)
    assert source.controller is not None
    process = source.controller.process
    assert process.stdin is not None
    process.stdin.close()
    wait_until(lambda: process.poll() is not None)
    source.close()
